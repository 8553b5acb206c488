"""ptxrun: execute the PTX that nvcc emits, on NumPy, with checks and a traffic model."""

from .launch import Device, Launch, Report, compile_cu, find_kernel, load
from .machine import Fault
from .parse import PtxError, parse

__all__ = [
    "Device",
    "Fault",
    "Launch",
    "PtxError",
    "Report",
    "compile_cu",
    "find_kernel",
    "load",
    "parse",
]
