# SPDX-License-Identifier: Apache-2.0
"""Devices and hosts: meshes, shardings, compilation, multi-host start-up, the context of a step."""
