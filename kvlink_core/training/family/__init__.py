"""The embedded family: one base trained with full attention on generated tales, and fine-tunes of it for each linker."""
