"""Sample completions: `engine` states what a sampler does; `hf` (transformers) and `vllm` are the samplers."""
