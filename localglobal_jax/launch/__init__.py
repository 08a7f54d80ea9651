# SPDX-License-Identifier: Apache-2.0
"""Starts the runs of a sweep on machines.

`expand` turns a config file into run descriptions; `preview` checks and describes them. `backend`
is the interface of a back end and `backends` the registry. The back ends `local`, `slurm`, `xpk`
and `tpu_vm` turn descriptions into commands and scripts, and start them. `pool` runs processes in
slots of this machine, `execute` calls external tools. `status` reads the state of a sweep from its
workdirs. Only `preview` and `status` import jax.
"""
