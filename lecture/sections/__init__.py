"""The sections of the report: every module here that declares a SECTION, in the lecture's order."""

import pkgutil
from importlib import import_module

from ..section import Section


def find() -> tuple[Section, ...]:
    """The sections of all modules of this package, sorted by the order that each declares."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return tuple(sorted((module.SECTION for module in modules), key=lambda section: section.order))


SECTIONS = find()
