"""Configuration of a run, from one declaration per option: a field of a section dataclass.

    @dataclass(frozen=True, kw_only=True)
    class MyRunConfig:
        federation: FederationConfig = field(default_factory=FederationConfig)
        client: MyClientConfig = field(default_factory=MyClientConfig)

    resolved = resolve(MyRunConfig, yaml_files=["my.yaml"], overrides={"num_rounds": 5})
    resolved.config.federation.num_rounds        # 5
    resolved.sources["federation.num_rounds"]    # "--num-rounds"

Later layers win: dataclass defaults < YAML files, in order < environment ``SFL_<OPTION>`` < overrides (the command
line). The help of an option is its line under "Attributes:" in the docstring of its dataclass.
"""

from sfl.utils.config.options import EXCLUSIVE, Option, options_of
from sfl.utils.config.resolve import Resolved, dump_yaml, load_config, resolve, to_dict

__all__ = ["EXCLUSIVE", "Option", "Resolved", "dump_yaml", "load_config", "options_of", "resolve", "to_dict"]
