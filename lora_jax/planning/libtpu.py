"""libtpu, the TPU's compiler and driver, on a machine that has no TPU."""

import glob
import os

import jax

# The compiler needs no TPU, but asks where it is; as it holds none, several processes may use it at once.
_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # what a TPU, among others, is for Linux


def without_tpu() -> None:
    """Tell libtpu where it is, on a machine without a TPU; what the environment says already stays."""
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)


def quieten() -> None:
    """Where there is no TPU, keep libtpu from asking for one with screens of errors, before JAX first looks for devices.

    Where JAX has found the chips of a TPU it has set `jax_platforms`, and where it was told what to use, it does not ask for
    TPUs. GPUs are found as ever.
    """
    if jax.config.jax_platforms is None and not any(map(glob.glob, _DEVICES)):
        without_tpu()
