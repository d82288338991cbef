"""The embedded family: a base trained with full attention on generated tales, and its fine-tunes for each linker."""
