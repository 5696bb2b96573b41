"""torch_tensorrt on a machine with neither TensorRT nor a GPU: all of it but the building and running of engines.

`install()` puts a stand-in in place of the module `tensorrt` (attributes are made as they are asked for), answers the
few questions to torch.cuda, and has the compiled libraries of torch_tensorrt left out, without which it works in
Python alone. Then its converters, decompositions, lowering, partitioners, `compile`, `save` and `load` are the real
ones. In an engine's place comes the very graph that it would be built of, run by torch: `ENGINES` has them.
"""

import importlib.machinery
import os
import sys
import types

VERSION = "11.0.0.114"
ENGINES = {}  # the bytes of an engine: (graph, the torch_tensorrt.Inputs that TensorRT would be given)


class _Names(type):
    """A class whose attributes come into being: enums, such as trt.DataType.FLOAT."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        member = _Member(f"{cls.__name__}.{name}")
        setattr(cls, name, member)
        return member

    def __iter__(cls):
        return iter(())

    def __or__(cls, other):
        return cls

    __ror__ = __or__


class _Member:
    """A member of an enum: equal to itself alone, an int, and nothing else."""

    _count = 0

    def __init__(self, name):
        self.name = name
        _Member._count += 1
        self._value = _Member._count

    def __repr__(self):
        return f"trt.{self.name}"

    def __int__(self):
        return self._value

    __index__ = __int__

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"there is no TensorRT here to call {self.name} of")


class _TensorRT(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__") or name == "tensorrt_rtx":
            raise AttributeError(name)
        made = _Names(name, (), {"__init__": lambda self, *args, **kwargs: None, "__module__": "tensorrt"})
        setattr(self, name, made)
        return made


def install():
    """Import torch_tensorrt over the stand-ins and return it; for a process of its own, which is not put back."""
    import torch

    stand_in = _TensorRT("tensorrt")
    stand_in.__version__, stand_in._package_name, stand_in.__path__ = VERSION, "tensorrt", []
    stand_in.__file__ = __file__
    stand_in.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None, is_package=True)
    stand_in.init_libnvinfer_plugins = lambda *args, **kwargs: True
    stand_in.get_plugin_registry = lambda: None
    stand_in.tensorrt = stand_in
    sys.modules["tensorrt"] = stand_in
    sys.modules.setdefault("dllist", types.SimpleNamespace(dllist=list))  # it is asked for cross-compilers
    device = types.SimpleNamespace(major=9, minor=0, name="a GPU that is not there")
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *args: (device.major, device.minor)
    torch.cuda.get_device_properties = lambda *args: device
    torch.cuda.default_stream = lambda *args: None
    torch.Tensor.cuda = lambda tensor, *args: tensor
    is_file = os.path.isfile
    os.path.isfile = lambda path: "libtorchtrt" not in os.path.basename(str(path)) and is_file(path)
    try:
        import torch_tensorrt
    finally:
        os.path.isfile = is_file
    _stand_in_for_engines(torch_tensorrt)
    return torch_tensorrt


def _stand_in_for_engines(torch_tensorrt):
    """Where an engine would be built keep the graph; where it would be opened or run, take that graph."""
    import torch
    from torch_tensorrt.dynamo import _compiler
    from torch_tensorrt.dynamo.conversion._symbolic_shape_capture import extract_symbolic_shape_expressions
    from torch_tensorrt.dynamo.runtime import TorchTensorRTModule
    from torch_tensorrt.dynamo.runtime._TRTEngine import TRTEngine

    def convert_module(module, inputs, settings, name, engine_cache):
        assert engine_cache is None
        key = b"ftrt%d" % len(ENGINES)  # as a real engine begins
        ENGINES[key] = (module, inputs)
        shapes = extract_symbolic_shape_expressions(module)
        outputs = [f"output{i}" for i, _ in enumerate(shapes["outputs"])]
        # as TRTInterpreter.placeholder and .output name them
        names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
        return TorchTensorRTModule(key, names, outputs, name=name, settings=settings, symbolic_shape_expressions=shapes)

    def open_engine(engine):
        assert engine.serialized_engine in ENGINES

    def execute(engine, tensors):
        graph, inputs = ENGINES[engine.serialized_engine]
        for tensor, wanted in zip(tensors, inputs, strict=True):
            assert tensor.dtype == wanted.dtype.to(torch.dtype), (wanted.name, tensor.dtype)
            shape = wanted.shape
            low, high = (shape["min_shape"], shape["max_shape"]) if isinstance(shape, dict) else (shape, shape)
            assert all(a <= n <= b for a, n, b in zip(low, tensor.shape, high, strict=True)), (wanted, tensor.shape)
        return graph(*tensors)

    gpu = torch_tensorrt.Device(gpu_id=0)
    _compiler.to_torch_tensorrt_device = lambda device: gpu
    _compiler.to_torch_device = lambda device: torch.device("cpu")
    _compiler.convert_module = convert_module
    TRTEngine._setup_engine, TRTEngine.execute = open_engine, execute
