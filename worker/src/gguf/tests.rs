//! Damaged, foreign and truncated model files; decoding of stored groups.

use std::fs;

use super::*;
use crate::model::{Model, ModelError, ModelOptions};
use crate::tiny::TinyModel;
use crate::tokenizer::Tokenizer;

fn open(bytes: &[u8]) -> Result<Gguf, GgufError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

// A file cut anywhere, as by an interrupted download, must be an error: try
// every length of the header, and the lengths around the end.
#[test]
fn every_prefix_is_an_error() {
    let bytes = TinyModel { layers: 1, ..TinyModel::default() }.to_bytes();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let header = bytes.len().min(6000);
    for len in (0..header).chain(bytes.len() - 40..bytes.len() - 32) {
        fs::write(&path, &bytes[..len]).unwrap();
        assert!(Gguf::open(&path).is_err(), "{len} of {} bytes are not a model", bytes.len());
    }
    fs::write(&path, &bytes).unwrap();
    assert!(Gguf::open(&path).is_ok());
}

// A damaged byte may change a size, a type or a length: flip bits all over the
// header and open everything that reads it. It may fail; it must not panic, nor
// take memory that the file does not justify.
#[test]
fn flipped_bits_never_panic() {
    let bytes = TinyModel { layers: 1, heads: 2, kv_heads: 1, context: 32, seed: 3 }.to_bytes();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let options = ModelOptions { threads: 1, ..ModelOptions::detect() };
    let mut state = 12_345u64;
    for round in 0..600 {
        let mut damaged = bytes.clone();
        for _ in 0..=round % 3 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = usize::try_from(state >> 33).unwrap() % 7000;
            damaged[at] ^= 1 << (state >> 20 & 7);
        }
        fs::write(&path, &damaged).unwrap();
        if let Ok(file) = Gguf::open(&path) {
            let _ = Tokenizer::from_gguf(&file);
            let _ = Model::open_with(&path, options);
        }
    }
}

// Each kind of wrong file must be refused with words that say what to do.
#[test]
fn wrong_files_are_explained() {
    let error = open(b"PK\x03\x04 a zip").err().unwrap().to_string();
    assert!(error.contains("not a GGUF file"), "{error}");
    let mut version = TinyModel::default().to_bytes();
    version[4] = 9;
    let error = open(&version).err().unwrap().to_string();
    assert!(error.contains("version 9"), "{error}");
    let error = Gguf::open(Path::new("/nonexistent/model.gguf")).err().unwrap().to_string();
    assert!(error.contains("/nonexistent/model.gguf"), "{error}");

    let bytes = TinyModel::default().to_bytes();
    let at = bytes.windows(5).position(|window| window == b"llama").unwrap();
    let mut other = bytes;
    other[at..at + 5].copy_from_slice(b"qwen9");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, &other).unwrap();
    let error = Model::open(&path).err().unwrap();
    assert!(matches!(&error, ModelError::Architecture { found } if found == "qwen9"));
    assert!(error.to_string().contains("Llama-family"), "{error}");
}

// A wrong unpacking of a quantised group gives a model that talks nonsense:
// compare one group of each simple type with values worked out by hand.
#[test]
fn groups_decode() {
    let scale = half::f16::from_f32(0.5).to_le_bytes();
    let minimum = half::f16::from_f32(-1.0).to_le_bytes();
    let mut values = [0.0; 32];
    let mut group = [scale.as_slice(), &[0x92; 16]].concat();
    TensorType::Q4_0.decode(&group, &mut values);
    assert_eq!((values[0], values[16]), (-3.0, 0.5));
    group = [scale.as_slice(), &minimum, &[0x92; 16]].concat();
    TensorType::Q4_1.decode(&group, &mut values);
    assert_eq!((values[0], values[31]), (0.0, 3.5));
    group = [scale.as_slice(), &[0xFE; 32]].concat();
    TensorType::Q8_0.decode(&group, &mut values);
    assert_eq!(values[5], -1.0);
    group = [scale.as_slice(), &[1, 0, 1, 0], &[0x92; 16]].concat();
    TensorType::Q5_0.decode(&group, &mut values);
    assert_eq!((values[0], values[1], values[16], values[17]), (1.0, -7.0, 4.5, -3.5));
    let mut many = [0.0; 256];
    group = [scale.as_slice(), &minimum, &[2; 4], &[3; 4], &[0x41; 4], &[0x92; 128]].concat();
    TensorType::Q4_K.decode(&group, &mut many);
    // Runs below 4: 0.5 * 2 * bits + 3; above: 0.5 * 1 * bits + 4.
    assert_eq!((many[0], many[32], many[128], many[160]), (5.0, 12.0, 5.0, 8.5));
    group = [&[0x21; 128][..], &[0b11_10_01_00; 64], &[2; 16], &scale].concat();
    TensorType::Q6_K.decode(&group, &mut many);
    assert_eq!((many[0], many[32], many[64], many[96]), (-31.0, -15.0, 2.0, 18.0));
}
