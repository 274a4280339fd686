//! The same model in the plainest arithmetic: f64, one token at a time, no
//! blocks. It knows what a Llama model is and nothing about how we compute it.

use std::path::Path;

use crate::gguf::Gguf;

struct Matrix {
    columns: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn read(file: &Gguf, name: &str) -> Self {
        let tensor = file.tensor(name).unwrap();
        let bytes = file.tensor_bytes(tensor).unwrap();
        let mut row = vec![0.0f32; tensor.columns];
        let mut values = Vec::new();
        for index in 0..tensor.rows {
            tensor.decode_row(&bytes, index, &mut row);
            values.extend(row.iter().map(|value| f64::from(*value)));
        }
        Self { columns: tensor.columns, values }
    }

    fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks_exact(self.columns)
    }

    fn times(&self, vector: &[f64]) -> Vec<f64> {
        self.rows().map(|row| dot(row, vector)).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn normal(values: &[f64], weight: &Matrix) -> Vec<f64> {
    let root = (dot(values, values) / values.len() as f64 + 1e-5).sqrt();
    values.iter().zip(&weight.values).map(|(value, weight)| value / root * weight).collect()
}

fn turn(head: &mut [f64], position: usize) {
    let size = head.len() as f64;
    for (pair, values) in head.chunks_exact_mut(2).enumerate() {
        let angle = position as f64 * 10_000f64.powf(-2.0 * pair as f64 / size);
        let (x, y) = (values[0], values[1]);
        values[0] = x * angle.cos() - y * angle.sin();
        values[1] = x * angle.sin() + y * angle.cos();
    }
}

/// Scores after the last token.
pub(super) fn scores(path: &Path, tokens: &[u32]) -> Vec<f64> {
    let file = Gguf::open(path).unwrap();
    let heads = file.count("llama.attention.head_count").unwrap();
    let kv_heads = file.count("llama.attention.head_count_kv").unwrap();
    let layers = file.count("llama.block_count").unwrap();
    let embedding = Matrix::read(&file, "token_embd.weight");
    let size = embedding.columns / heads;
    let mut residual: Vec<Vec<f64>> =
        tokens.iter().map(|token| embedding.rows().nth(*token as usize).unwrap().to_vec()).collect();
    for layer in 0..layers {
        let read = |part: &str| Matrix::read(&file, &format!("blk.{layer}.{part}.weight"));
        let (norm, query, key, value) = (read("attn_norm"), read("attn_q"), read("attn_k"), read("attn_v"));
        let (output, second) = (read("attn_output"), read("ffn_norm"));
        let (gate, up, down) = (read("ffn_gate"), read("ffn_up"), read("ffn_down"));
        let (mut keys, mut values): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (Vec::new(), Vec::new());
        for (position, row) in residual.iter_mut().enumerate() {
            let input = normal(row, &norm);
            let (mut queries, mut new) = (query.times(&input), key.times(&input));
            queries.chunks_exact_mut(size).for_each(|head| turn(head, position));
            new.chunks_exact_mut(size).for_each(|head| turn(head, position));
            keys.push(new);
            values.push(value.times(&input));
            let mut attended = Vec::new();
            for (head, query) in queries.chunks_exact(size).enumerate() {
                let at = head / (heads / kv_heads) * size;
                let powers: Vec<f64> = keys
                    .iter()
                    .map(|key| (dot(&key[at..at + size], query) / (size as f64).sqrt()).exp())
                    .collect();
                let total: f64 = powers.iter().sum();
                attended.extend((at..at + size).map(|dim| {
                    powers.iter().zip(&values).map(|(power, value)| power / total * value[dim]).sum::<f64>()
                }));
            }
            row.iter_mut().zip(output.times(&attended)).for_each(|(value, addend)| *value += addend);
            let input = normal(row, &second);
            let inner: Vec<f64> = gate
                .times(&input)
                .into_iter()
                .zip(up.times(&input))
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            row.iter_mut().zip(down.times(&inner)).for_each(|(value, addend)| *value += addend);
        }
    }
    embedding.times(&normal(residual.last().unwrap(), &Matrix::read(&file, "output_norm.weight")))
}
