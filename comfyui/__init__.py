"""pladis-surgery in ComfyUI: sparse attention to the text (PLADIS, GAG), and negative prompts in attention."""

try:
    from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]  # ComfyUI's own
except ImportError:  # an installation without the V3 schema
    from .nodes import NODES
    from .schemas import v1

    NODE_CLASS_MAPPINGS = v1()
    NODE_DISPLAY_NAME_MAPPINGS = {node.identifier: node.title for node in NODES}
else:
    from .schemas import v3

    class PladisSurgery(ComfyExtension):
        """What ComfyUI loads."""

        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            """The nodes."""
            return v3(io)

    async def comfy_entrypoint() -> ComfyExtension:
        """Called by ComfyUI."""
        return PladisSurgery()
