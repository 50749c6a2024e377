"""Fine-tune a published Stable Diffusion 1, 2 or XL on a folder of pictures: all of it, a LoRA, or one new word.

    python -m experiments.train --config=finetune --config.pretrained=DIR --config.data.path=FOLDER
    a LoRA:       --config.tune.method=lora --config.optimizer.learning_rate=1e-4
    a new word:   --config.tune.method=textual_inversion --config.tune.token='<cat>' --config.tune.like=cat
                  --config.tune.prompt='a photo of <cat>' --config.optimizer.learning_rate=5e-3
    DreamBooth:   --config.tune.prompt='a photo of sks dog'
                  --config.tune.class_path=PICTURES --config.tune.class_prompt='a photo of a dog'

Captions come from metadata.jsonl in FOLDER, or are all tune.prompt. PICTURES may be drawn by the model itself:

    python -m experiments.sample --pretrained DIR --prompt 'a photo of a dog' --num 200 --each PICTURES

Cost: all of SD 1.5 takes some 14 GB for parameters, their average and Adam's moments, before activations; see
`python -m experiments.memory` and --config.mesh.fsdp. Not run on published weights here, only on tiny random ones.
Expect: DreamBooth and a new word take some hundred to some thousand steps; look at the grids in samples/.
"""

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs._base import base


def get_config() -> Config:
    c = base()
    c.data.name = "folder"
    c.data.size = 512
    c.net = ConfigDict({"name": "published"})
    c.diffusion.schedule = "published"  # with the target and the time, as its scheduler_config.json says
    c.diffusion.target = "published"
    c.diffusion.time_input = "published"
    c.diffusion.times = "discrete(T=1000)"
    c.optimizer.learning_rate = 1e-5
    c.optimizer.warmup = 100
    c.optimizer.weight_decay = 1e-2
    c.train.batch_size = 4
    c.train.steps = 1000
    c.train.steps_per_call = 1
    c.train.remat = "full"
    c.train.ema = "warmed(decay=0.9999)"
    c.train.log_every = 10
    c.train.sample_every = 250
    c.train.checkpoint_every = 250
    c.sample.solver = "unipc_2"
    c.sample.grid = "published"
    c.sample.steps = 20
    c.sample.scale = 7.5
    c.sample.clip = False
    c.sample.num = 4
    return c
