"""The nodes as ComfyUI's classes: of its V3 schema, and of the older mapping for installations without that."""

from typing import Any

from .nodes import CATEGORY, NODES, Input, Node


def v3(io: Any) -> list[type]:
    """The nodes as classes of comfy_api.latest's `io`."""
    return [_v3(io, node) for node in NODES]


def v1() -> dict[str, type]:
    """{identifier: class} of the older kind."""
    return {node.identifier: _v1(node) for node in NODES}


def _v3(io, node):
    kinds = {"FLOAT": io.Float, "STRING": io.String, "COMBO": io.Combo, "MODEL": io.Model, "LATENT": io.Latent}
    kinds |= {"CONDITIONING": io.Conditioning, "CLIP": io.Clip, "IMAGE": io.Image}

    def given(one: Input):
        more = {"tooltip": one.tooltip, "optional": one.optional}
        if one.default is not None:
            more["default"] = one.default
        if one.type == "FLOAT":
            more |= {"min": one.least, "max": one.most, "step": 0.01}
        if one.options:
            more["options"] = list(one.options)
        return kinds[one.type].Input(one.name, **more)

    def define_schema(cls):
        return io.Schema(
            node_id=node.identifier,
            display_name=node.title,
            category=CATEGORY,
            description=node.description,
            inputs=[given(one) for one in node.inputs],
            outputs=[kinds[kind].Output(display_name=name) for kind, name in node.outputs],
            is_output_node=node.is_output,
        )

    def execute(cls, **inputs):
        values = node.run(**inputs)
        return io.NodeOutput(*values, ui={"text": (values[-1],)} if node.is_output else None)

    methods = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    return type(node.identifier, (io.ComfyNode,), {"__doc__": node.description, "__module__": __name__, **methods})


def _v1(node: Node):
    def given(one: Input):
        more: dict[str, Any] = {"tooltip": one.tooltip}
        if one.default is not None:
            more["default"] = one.default
        if one.type == "FLOAT":
            more |= {"min": one.least, "max": one.most, "step": 0.01}
        return (list(one.options) if one.options else one.type, more)

    def input_types(cls):
        required = {one.name: given(one) for one in node.inputs if not one.optional}
        return {"required": required, "optional": {one.name: given(one) for one in node.inputs if one.optional}}

    def execute(self, **inputs):
        values = node.run(**inputs)
        return {"ui": {"text": (values[-1],)}, "result": values} if node.is_output else values

    members = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(kind for kind, _ in node.outputs),
        "RETURN_NAMES": tuple(name for _, name in node.outputs),
        "FUNCTION": "execute",
        "CATEGORY": CATEGORY,
        "DESCRIPTION": node.description,
        "OUTPUT_NODE": node.is_output,
        "execute": execute,
        "__doc__": node.description,
        "__module__": __name__,
    }
    return type(node.identifier, (), members)
