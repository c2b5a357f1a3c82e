"""What engines see of moecache, and what it reads of theirs: `vllm`, `sglang` and `aiter` alone name one."""
