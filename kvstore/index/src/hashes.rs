//! What engines call a block: their hashes, recomputed from tokens, so that a router can find in the index
//! what an engine told of.
//!
//! These are aliases for routing. They never decide which bytes are served. Only whole blocks have a hash.
//! vLLM's default algorithm hashes a Python pickle and is not offered; its users set `sha256_cbor`.

use sha2::{Digest, Sha256};
use twox_hash::{XxHash3_64, XxHash3_128};

use crate::ids::Key;

/// vLLM's seed text where none is configured.
pub const VLLM_SEED: &str = "vllm-none-hash";
/// Dynamo's seed where neither adapter nor namespace gives another.
pub const DYNAMO_SEED: u64 = 1337;
/// What SGLang hashes before the parts of a namespace.
const SGLANG_NAMESPACE: &[u8] = b"sglang-cache-namespace-v1";

/// How vLLM hashes the canonical CBOR of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VllmHash {
    /// `sha256_cbor`: 32 bytes.
    Sha256,
    /// `xxhash_cbor`: the 16 bytes of XXH3-128, big-endian.
    Xxhash,
}

impl VllmHash {
    fn of(self, cbor: &[u8]) -> Vec<u8> {
        match self {
            Self::Sha256 => Sha256::digest(cbor).to_vec(),
            Self::Xxhash => XxHash3_128::oneshot(cbor).to_be_bytes().to_vec(),
        }
    }
}

/// vLLM's hash of each whole block of a prompt: that of parent, tokens and extra keys. `salt` is the
/// request's `cache_salt`, which is part of the first block.
///
/// # Panics
/// If `per_block` is zero.
pub fn vllm(
    hash: VllmHash,
    seed: &str,
    salt: Option<&str>,
    tokens: &[u32],
    per_block: usize,
) -> Vec<Vec<u8>> {
    let mut hashes: Vec<Vec<u8>> = Vec::with_capacity(tokens.len() / per_block);
    let root = vllm_root(hash, seed);
    let mut cbor = Vec::new();
    for block in tokens.chunks_exact(per_block) {
        let salt = if hashes.is_empty() { salt } else { None };
        cbor.clear();
        put_vllm_block(&mut cbor, hashes.last().unwrap_or(&root), block, salt);
        hashes.push(hash.of(&cbor));
    }
    hashes
}

/// What vLLM takes for the block before the first.
fn vllm_root(hash: VllmHash, seed: &str) -> Vec<u8> {
    let mut cbor = Vec::new();
    put_bytes(&mut cbor, TEXT, seed.as_bytes());
    hash.of(&cbor)
}

/// vLLM's hash of the block after `parent`, or of the first one.
pub fn vllm_next(hash: VllmHash, seed: &str, parent: Option<&[u8]>, tokens: &[u32]) -> Vec<u8> {
    let mut cbor = Vec::new();
    match parent {
        Some(parent) => put_vllm_block(&mut cbor, parent, tokens, None),
        None => put_vllm_block(&mut cbor, &vllm_root(hash, seed), tokens, None),
    }
    hash.of(&cbor)
}

/// Dynamo's sequence hash of the block after `parent`, or of the first one, and the hash of its tokens alone.
pub fn dynamo_next(seed: u64, parent: Option<u64>, tokens: &[u32]) -> (u64, u64) {
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    let own = XxHash3_64::oneshot_with_seed(seed, &bytes);
    let Some(parent) = parent else { return (own, own) };
    let both = [parent.to_le_bytes(), own.to_le_bytes()].concat();
    (XxHash3_64::oneshot_with_seed(seed, &both), own)
}

/// The number that vLLM's events give for a hash: its last eight bytes, big-endian. 0 of a shorter one.
pub fn vllm_event_number(hash: &[u8]) -> u64 {
    hash.last_chunk::<8>().map_or(0, |last| u64::from_be_bytes(*last))
}

/// SGLang's hash of each whole page: SHA-256 of the page before and the tokens. `namespace` are its extra
/// key and cache salt, if the request has any.
///
/// # Panics
/// If `per_page` is zero.
pub fn sglang(namespace: Option<[Option<&[u8]>; 2]>, tokens: &[u32], per_page: usize) -> Vec<[u8; 32]> {
    let mut prior: Option<[u8; 32]> = namespace.map(sglang_seed);
    let mut hashes = Vec::with_capacity(tokens.len() / per_page);
    for page in tokens.chunks_exact(per_page) {
        let hash = sglang_next(prior.as_ref(), page);
        prior = Some(hash);
        hashes.push(hash);
    }
    hashes
}

/// SGLang's hash of the page after `parent`, or of the first one without a namespace.
pub fn sglang_next(parent: Option<&[u8; 32]>, tokens: &[u32]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    if let Some(parent) = parent {
        hasher.update(parent);
    }
    tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
    hasher.finalize().into()
}

/// The seed of a namespace: a byte for each part says whether it is there; its length and bytes follow.
fn sglang_seed(parts: [Option<&[u8]>; 2]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(SGLANG_NAMESPACE);
    for part in parts {
        match part {
            None => hasher.update([0]),
            Some(bytes) => {
                hasher.update([1]);
                hasher.update((bytes.len() as u64).to_le_bytes());
                hasher.update(bytes);
            }
        }
    }
    hasher.finalize().into()
}

/// The number that SGLang's events give for a page without a namespace: its first eight bytes, signed.
pub fn sglang_event_number(hash: &[u8; 32]) -> i64 {
    hash.first_chunk::<8>().map_or(0, |first| i64::from_be_bytes(*first))
}

/// Dynamo's sequence hash of each whole block: XXH3-64 of the one before and of the block's own hash.
///
/// # Panics
/// If `per_block` is zero.
pub fn dynamo(seed: u64, tokens: &[u32], per_block: usize) -> Vec<u64> {
    let mut hashes: Vec<u64> = Vec::with_capacity(tokens.len() / per_block);
    let mut bytes = Vec::with_capacity(per_block * 4);
    for block in tokens.chunks_exact(per_block) {
        bytes.clear();
        block.iter().for_each(|token| bytes.extend(token.to_le_bytes()));
        let own = XxHash3_64::oneshot_with_seed(seed, &bytes);
        let hash = match hashes.last() {
            None => own,
            Some(before) => {
                bytes.clear();
                bytes.extend(before.to_le_bytes());
                bytes.extend(own.to_le_bytes());
                XxHash3_64::oneshot_with_seed(seed, &bytes)
            }
        };
        hashes.push(hash);
    }
    hashes
}

impl Key {
    /// A longer hash of an engine: its first 16 bytes. A shorter one must be given as a number, to
    /// [`Key::from_alias`].
    pub fn from_engine_hash(hash: &[u8]) -> Option<Self> {
        hash.first_chunk::<16>().map(|first| Self::from_bytes(*first))
    }
}

const UNSIGNED: u8 = 0;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const NULL: u8 = 0xf6;

/// `[parent, [tokens], null | [["cache_salt", salt]]]` in canonical CBOR.
fn put_vllm_block(cbor: &mut Vec<u8>, parent: &[u8], tokens: &[u32], salt: Option<&str>) {
    put_head(cbor, ARRAY, 3);
    put_bytes(cbor, BYTES, parent);
    put_head(cbor, ARRAY, tokens.len() as u64);
    tokens.iter().for_each(|token| put_head(cbor, UNSIGNED, u64::from(*token)));
    match salt {
        None => cbor.push(NULL),
        Some(salt) => {
            put_head(cbor, ARRAY, 1);
            put_head(cbor, ARRAY, 2);
            put_bytes(cbor, TEXT, b"cache_salt");
            put_bytes(cbor, TEXT, salt.as_bytes());
        }
    }
}

fn put_bytes(cbor: &mut Vec<u8>, major: u8, bytes: &[u8]) {
    put_head(cbor, major, bytes.len() as u64);
    cbor.extend_from_slice(bytes);
}

/// A major type and its number, in the fewest bytes.
fn put_head(cbor: &mut Vec<u8>, major: u8, number: u64) {
    let major = major << 5;
    if let Ok(byte) = u8::try_from(number) {
        if byte < 24 {
            cbor.push(major | byte);
        } else {
            cbor.extend([major | 24, byte]);
        }
    } else if let Ok(short) = u16::try_from(number) {
        cbor.push(major | 25);
        cbor.extend(short.to_be_bytes());
    } else if let Ok(word) = u32::try_from(number) {
        cbor.push(major | 26);
        cbor.extend(word.to_be_bytes());
    } else {
        cbor.push(major | 27);
        cbor.extend(number.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn tokens() -> Vec<u32> {
        // The last one is a tail, which has no hash.
        (0..33).collect()
    }

    /// A number could take more bytes than canonical CBOR allows, and every hash would differ.
    #[test]
    fn cbor_is_canonical() {
        let mut cbor = Vec::new();
        put_vllm_block(&mut cbor, &[0, 0], &[0, 1, 24, 300, 70_000], None);
        assert_eq!(hex(&cbor), "83420000850001181819012c1a00011170f6");
    }

    /// Computed with vLLM 0.33.0, and for xxhash with Python's `xxhash` over the same bytes.
    #[test]
    fn vllm_hashes_are_vllms() {
        let sha = vllm(VllmHash::Sha256, VLLM_SEED, None, &tokens(), 16);
        assert_eq!(sha.len(), 2);
        assert_eq!(hex(&sha[0]), "dc918a88b139e5afe60b88eda27508d4aee16c10fdc354791efea06206ac0749");
        assert_eq!(hex(&sha[1]), "c300ec275d7bf08af8fc63e76cdc0086911bbc7091e03c5cf892553bef84ef0c");
        assert_eq!(vllm_event_number(&sha[0]), 2_233_398_808_101_521_225);
        assert_eq!(vllm_event_number(&sha[1]), 17_911_472_383_915_781_900);
        let salted = vllm(VllmHash::Sha256, VLLM_SEED, Some("tenant-a"), &tokens(), 16);
        assert_eq!(hex(&salted[0]), "4e31e1ced73eb044a95997f0109d0ddab3d9145878214f1a0ee37c048b397859");
        let seeded = vllm(VllmHash::Sha256, "0", None, &tokens(), 16);
        assert!(hex(&seeded[0]).starts_with("d830de3d") && hex(&seeded[0]).ends_with("afc9c"));
        let xx = vllm(VllmHash::Xxhash, VLLM_SEED, None, &tokens(), 16);
        assert_eq!(hex(&xx[0]), "f2313f4548e185b1a011187a342021cc");
        assert_eq!(hex(&xx[1]), "74ee692fcce0684e02de354d6ca364b4");
    }

    /// Computed with SGLang 0.5.23, pages of 16.
    #[test]
    fn sglang_hashes_are_sglangs() {
        let pages = sglang(None, &tokens(), 16);
        assert_eq!(pages.len(), 2);
        assert_eq!(hex(&pages[0]), "5d85718ec594b982c252d0279e5966ffca33a5eaf2a455038d3ab331fde70cea");
        assert_eq!(hex(&pages[1]), "4681c0107c38f402cd1bc30b0b09a65202dba31f98269d9d7f63f5e0dea6901a");
        assert_eq!(sglang_event_number(&pages[0]), 6_738_917_275_443_968_386);
        let named = sglang(Some([None, Some(b"tenant-a")]), &tokens(), 16);
        assert_ne!(named[0], pages[0]);
    }

    /// Computed with Python's `xxhash` by Dynamo's recurrence.
    #[test]
    fn dynamo_hashes_are_dynamos() {
        let hashes = dynamo(DYNAMO_SEED, &tokens(), 16);
        assert_eq!(hashes, [15_310_707_395_893_867_146, 13_769_157_705_258_532_664]);
    }

    /// A hash that is too short for a key must not become one.
    #[test]
    fn short_hashes_are_no_keys() {
        assert_eq!(Key::from_engine_hash(&[1; 15]), None);
        assert_eq!(Key::from_engine_hash(&[1; 32]), Some(Key::from_bytes([1; 16])));
        assert_eq!(vllm_event_number(&[1; 7]), 0);
    }
}
