"""Test settings that must hold before JAX starts.

Responsible for: tests run on the CPU, split into eight devices, so that sharding is tested without an accelerator (an
ordinary computation still runs on the first of them). Not responsible for: processes that tests start; those inherit
the platform but not the number of devices, which is set in this process only.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402  the platform must be named before the import

jax.config.update("jax_num_cpu_devices", 8)
