"""Parameter-efficient methods: what is trained, how it is named and saved, and what it costs."""

from itune_ray.model.peft.apply import apply_peft as apply_peft
from itune_ray.model.peft.apply import initial_adapter as initial_adapter
from itune_ray.model.peft.apply import starts_by_name as starts_by_name
from itune_ray.model.peft.names import ADAPTER as ADAPTER
from itune_ray.model.peft.names import base_name as base_name
from itune_ray.model.peft.names import saved_name as saved_name
from itune_ray.model.peft.report import parameter_report as parameter_report
