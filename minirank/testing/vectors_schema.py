"""The JSON Schema of the vectors' files, of the adapters' golden.json and of results."""

from __future__ import annotations

from typing import Any

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
ERROR = {"type": "number", "minimum": 0}


def record(description: str, required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object with these names and no others."""
    return {
        "description": description,
        "type": "object",
        "required": list(required),
        "properties": {**required, **optional},
        "additionalProperties": False,
    }


def mapping(description: str, values: Any) -> dict[str, Any]:
    """An object whose names are free."""
    return {"description": description, "type": "object", "additionalProperties": values}


def reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


def listing(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


VALUE = {
    "description": "A value: null, a number, text or a list stand for themselves. An object has a "
    "name that starts with $.",
    "anyOf": [
        {"type": ["null", "boolean", "number", "string"]},
        listing(reference("value")),
        record(
            "A tensor of the safetensors file. In a result: the largest error that passes, for "
            "each entry, |got − right| ≤ allowed. Without `allowed` it must be equal.",
            {"$tensor": TEXT},
            allowed=ERROR,
        ),
        record(
            "A floating-point number as text: a result, with its allowed error; or what JSON has "
            "no number for.",
            {
                "$number": {
                    "type": "string",
                    "pattern": "^(NaN|-?Infinity|-?[0-9.]+(e[+-]?[0-9]+)?)$",
                }
            },
            allowed=ERROR,
        ),
        record(
            "A mapping as pairs of name and value. Their order counts: ties go to the earlier one, "
            "and the first pattern that matches wins.",
            {"$map": listing(listing(reference("value"), minItems=2, maxItems=2))},
        ),
    ],
}

CASE = record(
    "One call.",
    {
        "name": {
            **TEXT,
            "description": "Unique in the file; results are returned under it. A case of several "
            "calls has an entry for each: (1 of 2), (2 of 2).",
        },
        "equation": {**TEXT, "description": "The equation or rule that the case is about."},
        "dtype": {
            "enum": ["float64", "float32", None],
            "description": "Of the arguments that are tensors of floating point. null: the case "
            "has no such tensors, or dtypes of its own.",
        },
        "wanted": {
            "enum": ["value", "gradients"],
            "description": "value: what the function gives. gradients: a mapping from arguments "
            "to the gradients of Σ (result · `gradient of the result`).",
        },
        "arguments": mapping("By name, as in `signature`.", reference("value")),
        "result": reference("value"),
    },
)

FUNCTION = record(
    "functions/NAME.json: the cases of one function, smallest first.",
    {
        "format": {"const": 1},
        "function": TEXT,
        "source": {**TEXT, "description": "Paper and equations."},
        "signature": {**TEXT, "description": "Arguments, and the values of those left out."},
        "about": {**TEXT, "description": "What the function does, with the shapes of its tensors."},
        "free": {
            "type": ["string", "null"],
            "description": "In what a right result may differ, beside rounding. null: in nothing. "
            "Where it is text, let `check` compare.",
        },
        "tensors": {**TEXT, "description": "The safetensors file beside this one."},
        "cases": listing(CASE, minItems=1),
    },
)

LAYER = record(
    "A layer of the model.",
    {
        "type": {
            "enum": ["Linear", "Conv1D"],
            "description": "Linear: the weight is (d_out, d_in). Conv1D: (d_in, d_out).",
        },
        "rank": {**COUNT, "description": "0: the layer has no adapter."},
        "alpha": {"type": ["number", "null"]},
        "scaling": {"type": ["number", "null"], "description": "ΔW = scaling · B A."},
        "allowed": {**ERROR, "description": "The largest error of an entry of the output."},
    },
)

GOLDEN = record(
    "adapters/NAME/golden.json. For a layer L, golden.safetensors holds L.input (3, d_in) and "
    "L.output (3, d_out); model.safetensors holds L.weight and maybe L.bias.",
    {
        "format": {"const": 1},
        "adapter": TEXT,
        "source": TEXT,
        "equation": {**TEXT, "description": "With what goes wrong in a loader that fails here."},
        "layers": mapping("By the layer's name in the model.", LAYER),
    },
)

INDEX = record(
    "index.json",
    {
        "format": {"const": 1},
        "functions": mapping("{name: number of calls}", COUNT),
        "adapters": listing(TEXT),
        "left_out": mapping("{function: {why: cases, or * for all}}", mapping("", listing(TEXT))),
    },
)

RESULTS = record(
    "NAME.json with what a port computed, for `check`. Tensors stand in NAME.safetensors, or here "
    "as nested lists of numbers. Mappings may be plain objects.",
    {
        "results": mapping(
            'By the name of a case; in adapters.json: {adapter: {layer: output}}. {"$skipped": '
            "why} in place of a result says that there is none on purpose.",
            {},
        )
    },
)

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Golden vectors of minirank",
    "anyOf": [reference(name) for name in ("function", "golden", "index", "results")],
    "$defs": {
        "function": FUNCTION,
        "golden": GOLDEN,
        "index": INDEX,
        "results": RESULTS,
        "value": VALUE,
    },
}
