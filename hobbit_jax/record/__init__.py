"""Records: what every measurement leaves, one JSON line each.

`asked` has what can be asked, `record` the schema of a result, `files` where results are kept.
"""

from hobbit_jax.record.asked import (
    Asked,
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
    is_finished,
    read_record,
    read_records,
    record_path,
    write_record,
)
from hobbit_jax.record.machine import machine
from hobbit_jax.record.record import Measured, Record, combined, measured
from hobbit_jax.record.study import Study, read_study, study_names, write_study
