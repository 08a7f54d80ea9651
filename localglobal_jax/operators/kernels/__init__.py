# SPDX-License-Identifier: Apache-2.0
"""Fused formulations of operators, with derivatives written by hand. Equations are one level up."""
