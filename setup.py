"""Puts the compiled kernels of all instruction sets into the wheel; pyproject.toml has the rest.

zig's compiler makes them where the ``ziglang`` package is installed, for every Linux with glibc
2.17 or later, else the compiler of this host, for its own glibc. A host that installs a wheel
without them builds its own (``workers/native/build.py``), and so does an editable installation.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from workers.native.build import (
    INSTRUCTION_SETS,
    SHIPPED,
    BuildError,
    build,
    compilers,
    has_kernels,
    zig_compilers,
)


class BuildWithKernels(build_py):
    """Copies the packages, and builds the libraries beside their sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or not has_kernels():
            return
        folder = Path(self.build_lib, *SHIPPED.parts[-3:])
        # A library that is built where it is needed has $CC in its name, the package's has not.
        named = {name: value for name, value in os.environ.items() if name != "CC"}
        for wanted in INSTRUCTION_SETS:
            try:
                build(wanted, folder, named, zig_compilers() or compilers())
            except BuildError as err:
                self.warn(f"no kernels for {wanted.name} in the wheel: {err}")


class PackageWithKernels(Distribution):
    """Compiled though it has no module of Python in C: its wheel is unpacked as it is."""

    def has_ext_modules(self) -> bool:
        return has_kernels()


class WheelWithKernels(bdist_wheel):
    """A wheel for one platform and every Python 3: the libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        if self.root_is_pure:
            return super().get_tag()
        return "py3", "none", "manylinux_2_17_x86_64" if zig_compilers() else "linux_x86_64"


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels},
    distclass=PackageWithKernels,
)
