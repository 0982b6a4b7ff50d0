"""Make an exported model's requirements.txt: the packages that run it without torch."""

REQUIREMENTS_NAME = "requirements.txt"

COMMON = (
    "numpy>=2.0",
    "scipy>=1.13",
    "pillow>=11",
    "safetensors>=0.5",
    "pydantic>=2.7",
    "pyyaml>=6.0",
    "faster-coco-eval>=1.6",
    "platformdirs>=4.0",
    "rich>=13.7",
    "typer>=0.19",
    "ftfy>=6.1",
    "regex>=2024.5",
)
RUNTIME = {"onnx": "onnxruntime>=1.20", "openvino": "openvino>=2025.0"}


OWN_TOKENIZER = "tokenizers>=0.21"
"""The library that reads the tokenizer.json of models whose text tower has one."""


def requirements(format: str, *, own_tokenizer: bool = False) -> str:
    """Return the content of requirements.txt: ranges as in opensan's own metadata, without torch."""
    lines = ["# Without torch: pip install --no-deps opensan && pip install -r requirements.txt"]
    needed = [*COMMON, RUNTIME[format], *([OWN_TOKENIZER] if own_tokenizer else [])]
    return "\n".join([*lines, *needed]) + "\n"
