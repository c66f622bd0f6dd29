"""The same as `python -m lenvm_vllm.vllm_cli`, by a path."""

from lenvm_vllm.vllm_cli import main

if __name__ == "__main__":
    main()
