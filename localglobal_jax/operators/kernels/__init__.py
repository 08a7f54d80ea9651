# SPDX-License-Identifier: Apache-2.0
"""Fused implementations of operators, with derivatives written by hand."""
