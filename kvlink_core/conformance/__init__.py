"""Which architectures link exactly: every causal language model of transformers, tiny and random, is judged."""
