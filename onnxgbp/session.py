"""A session of ONNX Runtime: where it runs and with which options. The runtime is imported on first use."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import onnx

from onnxgbp.errors import OnnxgbpError
from onnxgbp.installed import onnxruntime_module
from onnxgbp.model import Source

__all__ = ["PROVIDERS", "fault", "open_session", "provider_of"]

PROVIDERS = ("auto", "cpu", "cuda")
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
# Every fault reaches the caller as an exception of ours, so the runtime's own lines on stderr would only repeat it.
_FATAL_ONLY = 4


def fault(error: BaseException) -> str:
    """The first line of what the runtime says, without its own prefix."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    said = lines[0].strip() if lines else type(error).__name__
    prefix, separator, rest = said.partition(" : ")
    return rest.partition(" : ")[2] or rest if separator and prefix.startswith("[ONNXRuntimeError]") else said


def open_session(
    proto: onnx.ModelProto,
    source: Source,
    provider: str,
    threads: int | None = None,
    *,
    spinning: bool = True,
    tf32: bool = False,
    cuda_graph: bool = False,
) -> Any:
    """A session for a model that was made of `source`, next to whose file its external data lie.

    The arguments are those of `Explainer`.

    Raises:
        OnnxgbpError: no ONNX Runtime or two of them are installed, CUDA was asked for and does not work, the runtime
            cannot load the model, or an option is CUDA's and the session would run on the CPU.
    """
    runtime = onnxruntime_module()
    try:
        data = proto.SerializeToString(deterministic=True)
    except Exception:  # noqa: BLE001 - protobuf's implementations differ in what they raise
        raise OnnxgbpError(f"{source.name} is larger than 2 GB: keep its weights in external data") from None
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    # Threads that go on spinning behind a run take the processor from whatever comes next. SqueezeNet, guided, two
    # threads of two sessions in turn on a busy machine: 85 ms of CPU time a call, 59 with this; one session: 60 and 58.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # What is planned from a first run is held beside what that run took, for each shape. ResNet-50, guided, eight
    # photos: 1133 MB at the most, and 736 without, at the same speed.
    options.enable_mem_pattern = False
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if source.path is not None:  # where external data, if any, is looked for
        folder = str(Path(source.path).resolve().parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    compiled_in = _CUDA in runtime.get_available_providers()
    if provider == "cuda" and not compiled_in:
        raise OnnxgbpError("the installed ONNX Runtime has no CUDA: install onnxruntime-gpu in its place")
    if provider == "cuda" or (provider == "auto" and compiled_in):
        # TF32 keeps 10 bits of mantissa: enough to flip ReLU decisions and with them whole pixels of the map.
        settings = {"use_tf32": str(int(tf32)), "enable_cuda_graph": str(int(cuda_graph))}
        session, why = _cuda_session(runtime, data, options, source, settings)
        if session is not None:
            return session
        if provider == "cuda":
            raise OnnxgbpError(
                f"CUDA does not work here ({why}): check driver, CUDA and cuDNN, or choose the provider cpu"
            )
    if cuda_graph:
        raise OnnxgbpError("cuda_graph is of CUDA alone, and this would run on the CPU: leave it out")
    try:
        return runtime.InferenceSession(data, options, providers=[_CPU])
    except Exception as error:  # noqa: BLE001 - as above
        raise OnnxgbpError(f"ONNX Runtime {runtime.__version__} cannot load {source.name}: {fault(error)}") from None


def provider_of(session: Any) -> str:
    """Where it runs: cpu or cuda."""
    return "cuda" if session.get_providers()[0] == _CUDA else "cpu"


def _cuda_session(runtime: Any, data: bytes, options: Any, source: Source, settings: dict[str, str]) -> tuple[Any, str]:
    """A session that really is on CUDA, or None and the reason. One that is not falls back to the CPU unasked."""
    # The libraries may also be found without it: the session decides, and what this prints of its failures is not ours.
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        if hasattr(runtime, "preload_dlls"):
            runtime.preload_dlls()
    try:
        session = runtime.InferenceSession(data, options, providers=[(_CUDA, settings), _CPU])
    except Exception as error:  # noqa: BLE001 - as above
        return None, f"{source.name}: {fault(error)}"
    if _CUDA not in session.get_providers():
        return None, "the session fell back to the CPU"
    return session, ""
