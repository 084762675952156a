"""Records: what every measurement leaves, one JSON line each.

`asked` has what can be asked, `record` the schema of a result, `files` where results are kept.
"""

from hobbit_jax.record.asked import (
    Benchmark,
    CacheTrial,
    EvalSizes,
    Inputs,
    MissModeTrial,
    Mixed,
    MixedInBytes,
    Native,
    PerSelection,
    QualityTrial,
    Uniform,
    low_formats,
    record_name,
)
from hobbit_jax.record.files import (
    Records,
    Study,
    is_finished,
    read_record,
    read_records,
    read_study,
    record_path,
    study_names,
    write_record,
    write_study,
)
from hobbit_jax.record.machine import machine
from hobbit_jax.record.record import Measured, Record, combined, measured
