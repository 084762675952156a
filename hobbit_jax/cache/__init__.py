"""The room that decides which experts are on the device, and puts them there.

`policy` chooses whom to evict (pure Python, no JAX); `pool` owns the slots.
"""
