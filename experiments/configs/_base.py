"""Every setting there is, with its meaning and a plain default. A config starts from this and says what differs."""

from ml_collections import ConfigDict

from experiments.configs import Config


def base() -> Config:
    """The settings that all configs share; `net` is filled by each config with its network's own options."""
    return ConfigDict(
        {
            "seed": 0,
            "data": {
                "name": "emoji",  # emoji | tfds | folder | swissroll
                "tfds": "",  # for tfds: the name, such as cifar10
                "split": "train",
                "points": 10_000,  # for swissroll
                # For folder: the directory; for tfds: its data_dir ('' = ~/tensorflow_datasets). Any config also takes
                # a .npz or .npy file (images, labels, captions) or a directory of MNIST's IDX files here.
                "path": "",
                "memory_gb": 2.0,  # a folder whose pictures take more, decoded, is streamed by Grain:
                "ahead": 16,  # so many batches ahead,
                "workers": 0,  # by so many processes; 0 = by threads of this one. The batches are the same.
                "size": 32,  # height and width
                "flip": False,  # random left-right flips
            },
            "condition": "none",  # none | label | caption
            "condition_dropout": 0.1,  # share of examples trained without their condition, for guidance
            "frozen": {  # networks that are used and not trained; see experiments/latents.py
                # '' = diffusion of pixels. For diffusion in latents: the workdir of a run of emoji_autoencoder, or the
                # folder of a published autoencoder (or of a pipeline that holds vae/), as diffusers writes it.
                "autoencoder": "",
                "text": "",  # '' = a small encoder trained along. For captions: the folder of a published CLIP or T5
                "cache": "",  # where what they make is kept; '' = ~/.cache/jaxdiff/frozen
            },
            # '' = from scratch. For --config=finetune: the folder of a Stable Diffusion 1, 2 or XL, as of diffusers.
            "pretrained": "",
            "tune": {  # what of it trains; see experiments/tuning.py
                "method": "full",  # full | lora | textual_inversion
                "variant": "",  # of the files to read, such as fp16
                "prompt": "",  # the caption of every picture; '' = those of the folder's metadata.jsonl
                "rank": 8,  # of lora
                "alpha": 8.0,  # its scale is alpha / rank
                "token": "<new>",  # of textual_inversion: the word, as captions and prompts have it,
                "like": "photo",  # the word that its vectors begin as,
                "vectors": 1,  # and how many there are
                "class_path": "",  # DreamBooth: pictures of the class that are not to be forgotten; '' = none
                "class_prompt": "",  # their caption
                "prior_weight": 1.0,  # of their loss
            },
            "net": {"name": "unet"},  # unet | dit | mlp | autoencoder, and the options of that class
            "autoencoder": {  # the loss of net autoencoder
                "error": "l1",  # l1 | l2
                "kl": 0.05,  # weight of the divergence of the latents from a normal distribution, in nats a pixel value
                "lpips": "",  # a safetensors file of jaxdiff.metrics.lpips; '' = without
                "lpips_weight": 1.0,
            },
            "text": {"vocab_size": 2048, "max_len": 16, "dim": 128, "depth": 2, "heads": 4},
            "diffusion": {  # each is a name, or name(option=value, ...)
                "schedule": "cosine",  # linear, ddpm_table, sigmoid, vp, ve, edm, rectified_flow, ...
                "target": "v",  # eps, x0, v, score, velocity, edm(sigma_data=)
                "weighting": "simple",  # on the squared error of the target; min_snr, p2, edm, sigmoid, ...
                "times": "uniform",  # stratified, antithetic, discrete(T=), logit_normal, log_normal
                "time_input": "t",  # t | index(T=1000) | logsnr | c_noise: what the network gets for a time
                "scale_input": "none",  # none | edm(sigma_data=0.5): what multiplies x_t before the network
                "noise_offset": 0.0,  # noise that all pixels of a channel share; 0.1 where it is used
            },
            "optimizer": {
                "learning_rate": 2e-4,
                "warmup": 1000,  # steps of linear warm-up
                "decay": "constant",  # constant | cosine | rsqrt: after warm-up, to zero at the last step
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip": 1.0,  # largest global norm of the gradient; 0 = no clipping
            },
            "train": {
                "batch_size": 128,
                "steps": 100_000,
                "accumulate": 1,  # micro-batches per step
                "steps_per_call": 10,  # optimizer steps per dispatch to the device
                "remat": "none",  # none | full | dots: what each block computes again to spare memory; the same numbers
                "dtype": "float32",  # float32 | bfloat16: what the network computes in; parameters stay float32
                "ema": "warmed(decay=0.9999)",  # constant(decay=) | warmed(decay=) | half_life(examples=, ramp=)
                "log_every": 100,
                "sample_every": 5000,  # 0 = only at the end
                "checkpoint_every": 5000,  # and always at the end, and when interrupted
                "keep": 2,  # checkpoints kept
            },
            "sample": {
                "solver": "unipc_2",  # see experiments.solvers for what each is worth
                # uniform | respaced(spacing='leading') | flow_shift | beta_t | karras | exponential | log_snr | ays ...
                # The range is in units of sigma / alpha: below 0.03 steps go to noise that 8 bits hardly show.
                "grid": "log_snr(sigma_min=0.03, sigma_max=30.0)",
                "steps": 20,
                "scale": 1.0,  # guidance; 1 = off
                "clip": True,  # keep each estimate of the data in [-1, 1]; not for latents
                "num": 64,  # pictures in a sample grid
                "seed": 0,
                "prompts": (),  # for condition=caption; () = captions of the training set
            },
            "mesh": {  # the devices of all hosts; -1 = all that are left
                "data": -1,  # each on its share of the batch
                "fsdp": 1,  # each with its share of the parameters, and of the batch
                "tensor": 1,  # each with its share of the heads and hidden channels
                "dead_after": 30.0,  # seconds without a sign of life from another process that end this one
                "slow_after": 600.0,  # seconds that another process may stand still and be waited for
            },
        }
    )
