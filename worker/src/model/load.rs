//! From a GGUF file to packed weights.

use std::collections::BTreeSet;

use rayon::ThreadPool;

use super::{Layer, Model, ModelError, Shape};
use crate::gguf::{Gguf, GgufError, TensorInfo, Value};
use crate::kernels::Isa;
use crate::kernels::gemm::{PANEL_ROWS, PackedMatrix};
use crate::kernels::lanes::LANES;
use crate::kv::Geometry;

// Limits on what a file may announce, far above any Llama-family model. They
// keep products of two sizes inside a usize.
const LAYERS_MAX: usize = 1 << 10;
const WIDTH_MAX: usize = 1 << 20;

pub(super) fn load(file: &Gguf, isa: Isa, pool: ThreadPool) -> Result<Model, ModelError> {
    let shape = shape(file)?;
    let loader = Loader { file, used: BTreeSet::new() };
    let fingerprint = file.fingerprint()?;
    let (loader, layers, embedding, output, output_norm, factors) = pool.install(|| {
        let mut loader = loader;
        let hidden = shape.hidden;
        let embedding = loader.matrix(&[("token_embd.weight".to_owned(), shape.vocabulary)], hidden)?;
        let output = if file.tensor("output.weight").is_some() {
            Some(loader.matrix(&[("output.weight".to_owned(), shape.vocabulary)], hidden)?)
        } else {
            None
        };
        let output_norm = loader.vector("output_norm.weight", hidden)?;
        let mut layers = Vec::new();
        for layer in 0..shape.kv.layers {
            layers.push(loader.layer(&shape, layer)?);
        }
        let factors = match file.tensor("rope_freqs.weight") {
            Some(_) => Some(loader.vector("rope_freqs.weight", shape.kv.head_dim / 2)?),
            None => None,
        };
        Ok::<_, ModelError>((loader, layers, embedding, output, output_norm, factors))
    })?;
    if let Some(extra) = file.tensors().find(|tensor| !loader.used.contains(&tensor.name)) {
        return Err(ModelError::Unsupported { what: format!("tensor {}", extra.name) });
    }
    let frequencies = frequencies(file, &shape, factors.as_deref())?;
    Ok(Model {
        shape,
        fingerprint,
        name: file.name(),
        isa,
        pool,
        layers,
        embedding,
        output,
        output_norm,
        frequencies,
    })
}

/// Reads and checks the sizes.
fn shape(file: &Gguf) -> Result<Shape, ModelError> {
    let architecture = file.architecture()?;
    if architecture != "llama" {
        return Err(ModelError::Architecture { found: architecture.to_owned() });
    }
    let size = |key: &str, max: usize| -> Result<usize, ModelError> {
        let key = format!("llama.{key}");
        let value = file.count(&key)?;
        if value == 0 || value > max {
            return Err(ModelError::Unsupported { what: format!("{key} = {value}") });
        }
        Ok(value)
    };
    let optional = |key: &str, default: usize| -> Result<usize, ModelError> {
        match file.value(&format!("llama.{key}")) {
            None => Ok(default),
            Some(_) => size(key, WIDTH_MAX),
        }
    };
    if file.value("llama.expert_count").is_some_and(|count| *count != Value::Integer(0)) {
        return Err(ModelError::Unsupported { what: "a mixture of experts".to_owned() });
    }
    let hidden = size("embedding_length", WIDTH_MAX)?;
    let heads = size("attention.head_count", WIDTH_MAX)?;
    let kv_heads = optional("attention.head_count_kv", heads)?;
    let head_dim = optional("attention.key_length", hidden / heads)?;
    let value_dim = optional("attention.value_length", head_dim)?;
    let rotated = optional("rope.dimension_count", head_dim)?;
    let tokens = file.texts("tokenizer.ggml.tokens").map_or(0, <[String]>::len);
    let vocabulary = file.tensor("token_embd.weight").map_or(tokens, |tensor| tensor.rows);
    let unsupported = |what: String| Err(ModelError::Unsupported { what });
    if !hidden.is_multiple_of(LANES) || hidden < PANEL_ROWS {
        return unsupported(format!("rows of {hidden} values, not a multiple of {LANES}"));
    }
    if !head_dim.is_multiple_of(LANES) || head_dim == 0 || value_dim != head_dim {
        return unsupported(format!("heads of {head_dim} and {value_dim} values"));
    }
    if rotated != head_dim {
        return unsupported(format!("rotation of {rotated} of {head_dim} values"));
    }
    if !heads.is_multiple_of(kv_heads) {
        return unsupported(format!("{heads} heads over {kv_heads}"));
    }
    let feed_forward = size("feed_forward_length", WIDTH_MAX)?;
    if !feed_forward.is_multiple_of(LANES) {
        return unsupported(format!("rows of {feed_forward} values, not a multiple of {LANES}"));
    }
    let layers = size("block_count", LAYERS_MAX)?;
    let context = size("context_length", 1 << 30)?;
    let epsilon_key = "llama.attention.layer_norm_rms_epsilon";
    let epsilon = file.float(epsilon_key).ok_or_else(|| GgufError::Key { key: epsilon_key.to_owned() })?;
    Ok(Shape {
        hidden,
        feed_forward,
        heads,
        kv: Geometry { layers, kv_heads, head_dim },
        vocabulary,
        context,
        epsilon: narrow(epsilon),
    })
}

/// Radians per position of each rotated pair.
fn frequencies(file: &Gguf, shape: &Shape, factors: Option<&[f32]>) -> Result<Vec<f64>, ModelError> {
    let base = file.float("llama.rope.freq_base").unwrap_or(10_000.0);
    let scale = match file.text("llama.rope.scaling.type") {
        Err(_) | Ok("none") => 1.0,
        Ok("linear") => file.float("llama.rope.scaling.factor").unwrap_or(1.0),
        Ok(other) => return Err(ModelError::Unsupported { what: format!("rope scaling {other}") }),
    };
    let dim = shape.kv.head_dim;
    let frequency = |pair: usize| {
        let factor = factors.map_or(1.0, |factors| f64::from(factors[pair]));
        base.powf(-2.0 * pair as f64 / dim as f64) / factor / scale
    };
    Ok((0..dim / 2).map(frequency).collect())
}

struct Loader<'a> {
    file: &'a Gguf,
    used: BTreeSet<String>,
}

impl<'a> Loader<'a> {
    fn layer(&mut self, shape: &Shape, layer: usize) -> Result<Layer, ModelError> {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let query_rows = shape.heads * shape.kv.head_dim;
        let kv_rows = shape.kv.kv_heads * shape.kv.head_dim;
        let queries = (name("attn_q"), query_rows);
        let keys = (name("attn_k"), kv_rows);
        let values = (name("attn_v"), kv_rows);
        let gates = (name("ffn_gate"), shape.feed_forward);
        let ups = (name("ffn_up"), shape.feed_forward);
        Ok(Layer {
            attention_norm: self.vector(&name("attn_norm"), shape.hidden)?,
            attention_input: self.matrix(&[queries, keys, values], shape.hidden)?,
            attention_output: self.matrix(&[(name("attn_output"), shape.hidden)], query_rows)?,
            forward_norm: self.vector(&name("ffn_norm"), shape.hidden)?,
            forward_input: self.matrix(&[gates, ups], shape.hidden)?,
            forward_output: self.matrix(&[(name("ffn_down"), shape.hidden)], shape.feed_forward)?,
        })
    }

    /// Packs tensors with these names and rows below each other.
    fn matrix(&mut self, parts: &[(String, usize)], columns: usize) -> Result<PackedMatrix, ModelError> {
        let mut loaded = Vec::new();
        for (name, rows) in parts {
            let tensor = self.tensor(name, *rows, columns)?;
            loaded.push((tensor, self.file.tensor_bytes(tensor)?));
        }
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        PackedMatrix::pack(rows, columns, |index, target| {
            let mut row = index;
            for (tensor, bytes) in &loaded {
                if row < tensor.rows {
                    tensor.decode_row(bytes, row, target);
                    return Ok(());
                }
                row -= tensor.rows;
            }
            unreachable!("row {index} lies in one of the parts");
        })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensor(name, 1, len)?;
        let bytes = self.file.tensor_bytes(tensor)?;
        let mut values = vec![0.0; len];
        tensor.decode_row(&bytes, 0, &mut values);
        Ok(values)
    }

    fn tensor(&mut self, name: &str, rows: usize, columns: usize) -> Result<&'a TensorInfo, ModelError> {
        let wrong = |found| ModelError::Tensor { name: name.to_owned(), rows, columns, found };
        let tensor = self.file.tensor(name).ok_or_else(|| wrong("it is absent".to_owned()))?;
        if (tensor.rows, tensor.columns) != (rows, columns) {
            return Err(wrong(format!("it is {} by {}", tensor.rows, tensor.columns)));
        }
        self.used.insert(name.to_owned());
        Ok(tensor)
    }
}

#[allow(clippy::cast_possible_truncation, reason = "epsilon was an f32 in the file")]
fn narrow(value: f64) -> f32 {
    value as f32
}
