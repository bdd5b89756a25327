//! Which tensors a synthetic model has, and which Grams go with them.

// A bench makes one family of them.
#![allow(dead_code)]

use serde_json::{Value, json};

use super::synthetic::{Statistics, Synthetic};

/// Names, shapes and inputs as one of two families has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Decoder only, gated MLP, head of its own.
    Llama,
    /// T5 1.1: encoder and decoder of `layers` blocks each, cross attention, gated MLP, head of its own.
    T5,
}

/// A tensor of a model.
pub(crate) struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    /// Index among all tensors: its random stream, the same in every model.
    pub stream: u64,
    /// Statistics of a Linear.
    linear: Option<Linear>,
}

/// What a Linear's statistics are.
struct Linear {
    /// The block it is in; `None` for the head, which has no output Gram.
    layer: Option<usize>,
    /// The tensor before it that sees the same input.
    same_input: Option<String>,
}

impl Tensor {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// One entry of a statistics file: the packed lower triangle of a Gram.
pub(crate) struct Gram {
    pub key: String,
    pub side: usize,
    pub stream: u64,
    pub output: bool,
}

/// Collects the tensors of a model in their order.
#[derive(Default)]
struct Tensors(Vec<Tensor>);

impl Tensors {
    fn add(&mut self, name: String, shape: Vec<usize>, linear: Option<Linear>) {
        let stream = self.0.len() as u64;
        self.0.push(Tensor { name, shape, stream, linear });
    }

    fn plain(&mut self, name: impl Into<String>, shape: Vec<usize>) {
        self.add(name.into(), shape, None);
    }

    /// Linears of one input, `[out, in]` each.
    fn linears(&mut self, layer: usize, prefix: &str, parts: &[(&str, usize)], input: usize) {
        let name = |part: &str| format!("{prefix}.{part}.weight");
        for (k, (part, output)) in parts.iter().enumerate() {
            let same_input = (k > 0).then(|| name(parts[0].0));
            self.add(name(part), vec![*output, input], Some(Linear { layer: Some(layer), same_input }));
        }
    }

    fn head(&mut self, shape: Vec<usize>) {
        self.add("lm_head.weight".to_owned(), shape, Some(Linear { layer: None, same_input: None }));
    }
}

impl Layout {
    pub fn tensors(self, synthetic: &Synthetic) -> Vec<Tensor> {
        let mut tensors = Tensors::default();
        match self {
            Self::Llama => llama(synthetic, &mut tensors),
            Self::T5 => t5(synthetic, &mut tensors),
        }
        tensors.0
    }

    /// Elements of one layer, and of all that is no layer.
    pub fn elements(self, synthetic: &Synthetic) -> (usize, usize) {
        let count = |layers| -> usize {
            let one = Synthetic { layers, ..synthetic.clone() };
            self.tensors(&one).iter().map(Tensor::elements).sum()
        };
        let rest = count(0);
        (count(1) - rest, rest)
    }

    /// `config.json`.
    pub fn config(self, synthetic: &Synthetic) -> Value {
        let Synthetic { hidden, intermediate, layers, vocabulary, element, .. } = synthetic;
        match self {
            Self::Llama => json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "num_hidden_layers": layers,
                "num_attention_heads": (hidden / 128).max(1),
                "vocab_size": vocabulary,
                "tie_word_embeddings": false,
                "torch_dtype": element.torch_name(),
            }),
            Self::T5 => json!({
                "architectures": ["T5ForConditionalGeneration"],
                "model_type": "t5",
                "d_model": hidden,
                "d_ff": intermediate,
                "d_kv": 64.min(*hidden),
                "num_heads": (hidden / 64).max(1),
                "num_layers": layers,
                "num_decoder_layers": layers,
                "feed_forward_proj": "gated-gelu",
                "vocab_size": vocabulary,
                "tie_word_embeddings": false,
                "torch_dtype": element.torch_name(),
            }),
        }
    }

    /// Grams, and aliases where two Linears see the same input. Only the first `statistics_layers` blocks have some.
    pub fn grams(self, synthetic: &Synthetic, kind: Statistics) -> (Vec<Gram>, Vec<(String, String)>) {
        let mut grams = Vec::new();
        let mut aliases = Vec::new();
        for tensor in self.tensors(synthetic) {
            let Some(linear) = &tensor.linear else { continue };
            if linear.layer.is_some_and(|layer| layer >= synthetic.statistics_layers) {
                continue;
            }
            let stream = (1 << 32) | (2 * tensor.stream);
            let key = format!("{}/input_gram", tensor.name);
            match &linear.same_input {
                Some(first) => aliases.push((key, format!("{first}/input_gram"))),
                None => grams.push(Gram { key, side: tensor.shape[1], stream, output: false }),
            }
            if kind == Statistics::Kfac && linear.layer.is_some() {
                let key = format!("{}/output_gram", tensor.name);
                grams.push(Gram { key, side: tensor.shape[0], stream: stream + 1, output: true });
            }
        }
        (grams, aliases)
    }
}

fn llama(synthetic: &Synthetic, tensors: &mut Tensors) {
    let Synthetic { hidden, intermediate, vocabulary, .. } = *synthetic;
    tensors.plain("model.embed_tokens.weight", vec![vocabulary, hidden]);
    for layer in 0..synthetic.layers {
        let prefix = format!("model.layers.{layer}");
        tensors.plain(format!("{prefix}.input_layernorm.weight"), vec![hidden]);
        let attention = format!("{prefix}.self_attn");
        let three = [("q_proj", hidden), ("k_proj", hidden), ("v_proj", hidden)];
        tensors.linears(layer, &attention, &three, hidden);
        tensors.linears(layer, &attention, &[("o_proj", hidden)], hidden);
        tensors.plain(format!("{prefix}.post_attention_layernorm.weight"), vec![hidden]);
        let mlp = format!("{prefix}.mlp");
        tensors.linears(layer, &mlp, &[("gate_proj", intermediate), ("up_proj", intermediate)], hidden);
        tensors.linears(layer, &mlp, &[("down_proj", hidden)], intermediate);
    }
    tensors.plain("model.norm.weight", vec![hidden]);
    tensors.head(vec![vocabulary, hidden]);
}

fn t5(synthetic: &Synthetic, tensors: &mut Tensors) {
    let Synthetic { hidden, intermediate, vocabulary, .. } = *synthetic;
    tensors.plain("shared.weight", vec![vocabulary, hidden]);
    for stack in ["encoder", "decoder"] {
        for layer in 0..synthetic.layers {
            let block = format!("{stack}.block.{layer}.layer");
            let attention = format!("{block}.0.SelfAttention");
            tensors.linears(layer, &attention, &[("q", hidden), ("k", hidden), ("v", hidden)], hidden);
            tensors.linears(layer, &attention, &[("o", hidden)], hidden);
            if layer == 0 {
                let bias = format!("{attention}.relative_attention_bias.weight");
                tensors.plain(bias, vec![32, (hidden / 64).max(1)]);
            }
            tensors.plain(format!("{block}.0.layer_norm.weight"), vec![hidden]);
            let mut next = 1;
            if stack == "decoder" {
                let attention = format!("{block}.1.EncDecAttention");
                tensors.linears(layer, &attention, &[("q", hidden)], hidden);
                // Both see what the encoder gives.
                tensors.linears(layer, &attention, &[("k", hidden), ("v", hidden)], hidden);
                tensors.linears(layer, &attention, &[("o", hidden)], hidden);
                tensors.plain(format!("{block}.1.layer_norm.weight"), vec![hidden]);
                next = 2;
            }
            let mlp = format!("{block}.{next}.DenseReluDense");
            tensors.linears(layer, &mlp, &[("wi_0", intermediate), ("wi_1", intermediate)], hidden);
            tensors.linears(layer, &mlp, &[("wo", hidden)], intermediate);
            tensors.plain(format!("{block}.{next}.layer_norm.weight"), vec![hidden]);
        }
        tensors.plain(format!("{stack}.final_layer_norm.weight"), vec![hidden]);
    }
    tensors.head(vec![vocabulary, hidden]);
}
