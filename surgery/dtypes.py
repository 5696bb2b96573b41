"""The dtypes that a pipeline may be asked to run in, by torch's names and by their short ones."""

SHORT_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DTYPES = tuple(SHORT_NAMES.values())
