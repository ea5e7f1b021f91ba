"""Sample completions: `engine` is the interface, `hf` (transformers) and `vllm` implement it."""
