"""Write a run's heads for a server: as a Medusa drafter, which vLLM loads beside the backbone.

    python experiments/export_medusa.py runs/mtp medusa     # medusa/backbone and medusa/heads

The heads of an MTP model with residual blocks are exactly a Medusa drafter: Medusa's head i
(blocks.i, lm_heads.i) predicts the token i + 2 positions after the hidden state, our offset i + 2.
The format is that of vLLM's models/medusa.py. Our biases are its medusa_fc_bias; a shared
unembedding is its original_lm_head. It has not been tried in vLLM yet."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, load_checkpoint, one_line_errors
from heads import mtp_offsets
from model import InputError, write_pretrained


def export_medusa(model, folder):
    """Write a MultiTokenGPT's heads into a folder. Raises InputError for heads that Medusa does
    not have, and OSError if the folder cannot be written."""
    config, gpt, n = model.heads_config, model.gpt, len(model.offsets)
    if n < 2 or model.offsets != mtp_offsets(n):
        raise InputError("Medusa's heads are offsets 2, 3, ... without a gap, not "
                         f"{model.offsets}: servers do not look back yet, so leap heads cannot be "
                         "exported")
    if config.kind != "resblock" or config.whs or config.conditional:
        reason = "these read all layers" if config.whs else f"these are of kind {config.kind!r}"
        reason = "these also read the next token" if config.conditional else reason
        raise InputError(f"Medusa's heads are residual blocks that read the last layer; {reason}")
    tensors = {}
    for i, o in enumerate(model.offsets[1:]):
        for j, linear in enumerate(model.heads[str(o)].blocks):
            tensors[f"blocks.{i}.layers.{j}.weight"] = linear.weight
            tensors[f"blocks.{i}.layers.{j}.bias"] = linear.bias
        if config.own_unembedding or i == 0:
            unembed = model.heads[str(o)].unembedding or gpt.lm_head
            tensors[f"lm_heads.{i}.weight"] = unembed.weight
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_pretrained(folder, tensors, dict(
        architectures=["MedusaModel"], model_type="medusa", hidden_size=gpt.config.n_embd,
        vocab_size=gpt.config.vocab_size, num_heads=n - 1, num_hidden_layers=config.n_layer,
        medusa_fc_bias=True, original_lm_head=not config.own_unembedding))


def main(argv=None):
    """Export a run. Bad input is one line and status 2."""
    p = Parser(prog="export_medusa.py", description="Write a run as a backbone in Hugging Face's "
               "format and its MTP heads in the format of vLLM's Medusa drafter.")
    p.add_argument("run", metavar="RUN", help="a run of train.py with offsets 1,2,3,...")
    p.add_argument("folder", metavar="FOLDER", help="where to write the folders heads and "
                   "backbone")
    args = p.parse_args(argv)
    with one_line_errors("export_medusa.py", memory="nothing; use a smaller model"):
        model, _ = load_checkpoint(args.run)
        export_medusa(model, Path(args.folder) / "heads")
        model.gpt.save_pretrained(Path(args.folder) / "backbone")
        print(f"written to {args.folder}/heads and {args.folder}/backbone")


if __name__ == "__main__":
    main()
