# SPDX-License-Identifier: Apache-2.0
"""Compiles a run's real step for devices that are not here, and says what that will take."""
