"""All kinds, in the order of the table."""

from trials import (
    damage,
    flags,
    hostile_adapters,
    hostile_data,
    hostile_models,
    operations,
    power,
    processes,
    serving,
    small,
    stubs,
    surroundings,
    unpacked,
)

KINDS = (
    *(*processes.KINDS, *operations.KINDS, *power.KINDS, *small.KINDS, *damage.KINDS, *unpacked.KINDS),
    *(*hostile_models.KINDS, *hostile_adapters.KINDS, *hostile_data.KINDS),
    *(*flags.KINDS, *surroundings.KINDS, *stubs.KINDS, *serving.KINDS),
)
