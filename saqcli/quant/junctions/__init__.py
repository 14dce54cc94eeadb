"""Junctions: operators other than layers whose operands are quantized, and one quantizer for every tensor.

A runtime that computes in integers needs the operands of additions, concatenations, pools and gates on grids too. Which
kinds of operators are such *junctions* is chosen with the network; without any, nothing here is used.
"""
