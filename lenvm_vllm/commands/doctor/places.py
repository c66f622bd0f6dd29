"""Where vLLM and we write to."""

from collections.abc import Iterator

from lenvm_vllm.commands.doctor.finding import Finding
from lenvm_vllm.commands.doctor.packages import has_vllm
from lenvm_vllm.host import machine


def findings() -> Iterator[Finding]:
    """Only those that are not as they must be."""
    for variable, folder in machine.caches():
        used = has_vllm() or not variable.startswith("VLLM")
        if used and not machine.is_writable(folder):
            advice = f"make it writable, or set {variable} to a folder that is"
            yield Finding("folders", f"{folder}: not writable, but models are kept there", advice)
    shared = machine.shared_mib()
    if has_vllm() and shared is not None and shared < machine.SHARED_MIB:
        text = f"{shared} MiB free, vLLM takes {machine.SHARED_MIB}"
        yield Finding(
            "/dev/shm", text, "`docker run --shm-size 1g`, or `shm_size: 1gb` in a compose file"
        )
