"""Ahead of time: what attention a UNet computes, and the plans it would get, without its weights or its device."""
