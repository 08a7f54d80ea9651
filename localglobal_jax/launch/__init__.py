# SPDX-License-Identifier: Apache-2.0
"""From a sweep to machines that run it.

`expand` makes run descriptions of a config file, `preview` checks them and says what they would do.
The back ends `local`, `slurm`, `xpk` and `tpu_vm` are pure: descriptions in, argument lists and
scripts out. `pool` runs processes in slots of this machine, `execute` calls other people's tools.
`status` reads what became of it from the workdirs. Only `preview` and `status` import jax.
"""
