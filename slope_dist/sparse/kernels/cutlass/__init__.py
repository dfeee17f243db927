"""2:4 products by CUTLASS, compiled where they are used: values and metadata each where they lie, never copied.

Compiled for sm_80 and sm_90a; not yet run on a card.
"""
