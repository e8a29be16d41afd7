"""Networks: the backbone, the heads, the EMA teacher."""
