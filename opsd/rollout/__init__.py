"""Sample completions: prompts as token ids with a seed each enter, `Completion`s leave.

`engine` states what a sampler must do; `hf` (transformers) and `vllm` are the two samplers. `vllm_push`
copies merged weights into vLLM after an optimizer step; `vllm_setup` and `vllm_process` start the engine.
"""
