//! How one engine is followed: its line on the command line.

use std::str::FromStr;

use terrace_index::Key;
use terrace_index::hashes::{
    DYNAMO_SEED, VLLM_SEED, VllmHash, dynamo, sglang, sglang_event_number, vllm, vllm_event_number,
};

use crate::zmtp::address::{Address, BadAddress};

/// Longest name.
const NAME_BYTES_MAX: usize = 64;
/// Tokens of a block where nothing else is said: vLLM's default.
const BLOCK_TOKENS: u32 = 16;
/// Largest block that engines have.
const BLOCK_TOKENS_MAX: u32 = 4096;

/// An engine to follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Its name as a holder.
    pub name: String,
    /// Where its events come from.
    pub events: Events,
    /// What its topics begin with.
    pub topic: String,
    /// How it names blocks.
    pub hash: Hash,
    /// Tokens of a block.
    pub block_tokens: u32,
}

/// Where events come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Events {
    /// The publisher listens.
    Connect {
        /// For events.
        address: Address,
        /// For what was missed, if it offers that.
        replay: Option<Address>,
    },
    /// Publishers come to us.
    Bind {
        /// Where we listen.
        address: Address,
    },
}

/// How an engine names blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hash {
    /// vLLM's, with the text that its first parent is the hash of.
    Vllm(VllmHash, String),
    /// SGLang's.
    Sglang,
    /// Dynamo's sequence hashes.
    Dynamo,
}

impl Hash {
    /// The keys of a prompt's whole blocks in the index.
    pub fn keys(&self, tokens: &[u32], block_tokens: u32) -> Vec<Key> {
        let each = block_tokens as usize;
        if each == 0 || tokens.len() < each {
            return Vec::new();
        }
        match self {
            Self::Vllm(hash, seed) => {
                let hashes = vllm(*hash, seed, None, tokens, each);
                hashes.iter().map(|hash| Key::from_alias(vllm_event_number(hash))).collect()
            }
            Self::Sglang => {
                let hashes = sglang(None, tokens, each);
                let number = |hash| sglang_event_number(hash).cast_unsigned();
                hashes.iter().map(|hash| Key::from_alias(number(hash))).collect()
            }
            Self::Dynamo => dynamo(DYNAMO_SEED, tokens, each).into_iter().map(Key::from_alias).collect(),
        }
    }
}

/// A line that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSpec {
    /// Not of the form `key=value`.
    #[error("`{found}` is not of the form key=value")]
    Form {
        /// The part.
        found: String,
    },
    /// A key that there is not.
    #[error("there is no `{found}`; there are name, connect, bind, replay, topic, hash, seed and block")]
    Key {
        /// The key.
        found: String,
    },
    /// A key that is there twice.
    #[error("`{found}` is there twice")]
    Twice {
        /// The key.
        found: String,
    },
    /// A name that is none.
    #[error("an engine needs a name of 1 to {NAME_BYTES_MAX} letters, digits, `-`, `_` or `.`")]
    Name,
    /// No events, or from two places.
    #[error("an engine has either `connect` or `bind`; `replay` goes with `connect`")]
    Events,
    /// An endpoint that is none.
    #[error(transparent)]
    Address(#[from] BadAddress),
    /// A listener that other machines could reach.
    #[error(
        "{found} can be reached from other machines, and nothing there is encrypted; bind a loopback address"
    )]
    NotLocal {
        /// The endpoint.
        found: Address,
    },
    /// A hash that we do not know.
    #[error("`{found}` is no hash; there are vllm-sha256-cbor, vllm-xxhash-cbor, sglang and dynamo")]
    Hash {
        /// The word.
        found: String,
    },
    /// A seed where there is none.
    #[error("`seed` goes with vLLM's hashes")]
    Seed,
    /// A number of tokens that no block has.
    #[error("`block` is a number of tokens from 1 to {BLOCK_TOKENS_MAX}")]
    Block,
}

impl FromStr for Spec {
    type Err = BadSpec;

    fn from_str(line: &str) -> Result<Self, BadSpec> {
        let mut parts: Vec<(&str, &str)> = Vec::new();
        for part in line.split(',') {
            let (key, value) = part.split_once('=').ok_or(BadSpec::Form { found: part.to_owned() })?;
            let found = key.to_owned();
            if !["name", "connect", "bind", "replay", "topic", "hash", "seed", "block"].contains(&key) {
                return Err(BadSpec::Key { found });
            }
            if parts.iter().any(|(known, _)| *known == key) {
                return Err(BadSpec::Twice { found });
            }
            parts.push((key, value));
        }
        let value = |key| parts.iter().find(|(known, _)| *known == key).map(|(_, value)| *value);
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        let name =
            value("name").filter(|name| (1..=NAME_BYTES_MAX).contains(&name.len())).ok_or(BadSpec::Name)?;
        if !name.chars().all(is_plain) {
            return Err(BadSpec::Name);
        }
        let block = value("block").map_or(Ok(BLOCK_TOKENS), str::parse);
        let block_tokens = block.ok().filter(|tokens| (1..=BLOCK_TOKENS_MAX).contains(tokens));
        Ok(Self {
            name: name.to_owned(),
            events: events(value("connect"), value("bind"), value("replay"))?,
            topic: value("topic").unwrap_or("").to_owned(),
            hash: hash(value("hash"), value("seed"))?,
            block_tokens: block_tokens.ok_or(BadSpec::Block)?,
        })
    }
}

fn events(connect: Option<&str>, bind: Option<&str>, replay: Option<&str>) -> Result<Events, BadSpec> {
    match (connect, bind, replay) {
        (Some(address), None, replay) => {
            let replay = replay.map(str::parse).transpose()?;
            Ok(Events::Connect { address: address.parse()?, replay })
        }
        (None, Some(address), None) => {
            let address: Address = address.parse()?;
            if !address.is_local() {
                return Err(BadSpec::NotLocal { found: address });
            }
            Ok(Events::Bind { address })
        }
        _ => Err(BadSpec::Events),
    }
}

fn hash(word: Option<&str>, seed: Option<&str>) -> Result<Hash, BadSpec> {
    let text = || seed.unwrap_or(VLLM_SEED).to_owned();
    let hash = match word {
        None | Some("vllm-sha256-cbor") => return Ok(Hash::Vllm(VllmHash::Sha256, text())),
        Some("vllm-xxhash-cbor") => return Ok(Hash::Vllm(VllmHash::Xxhash, text())),
        Some("sglang") => Hash::Sglang,
        Some("dynamo") => Hash::Dynamo,
        Some(other) => return Err(BadSpec::Hash { found: other.to_owned() }),
    };
    if seed.is_some() { Err(BadSpec::Seed) } else { Ok(hash) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An engine that is followed wrongly looks like one that holds nothing: a line must be read as it was
    /// meant, or refused with the word that is wrong.
    #[test]
    fn lines_are_read_or_refused() {
        let line = "name=v-0,connect=tcp://node:5557,replay=tcp://node:5558,topic=kv@,seed=0,block=32";
        let spec: Spec = line.parse().unwrap();
        assert_eq!((spec.name.as_str(), spec.topic.as_str(), spec.block_tokens), ("v-0", "kv@", 32));
        assert_eq!(spec.hash, Hash::Vllm(VllmHash::Sha256, "0".to_owned()));
        let replay = Some("tcp://node:5558".parse().unwrap());
        assert_eq!(spec.events, Events::Connect { address: "tcp://node:5557".parse().unwrap(), replay });
        let spec: Spec = "name=s,bind=ipc:///run/s,hash=sglang".parse().unwrap();
        assert_eq!((spec.hash, spec.block_tokens), (Hash::Sglang, 16));
        for (line, wanted) in [
            ("name=a", "either `connect` or `bind`"),
            ("connect=tcp://a:1", "needs a name"),
            ("name=a b,connect=tcp://a:1", "needs a name"),
            ("name=a,connect=tcp://a:1,bind=tcp://127.0.0.1:1", "either"),
            ("name=a,bind=tcp://127.0.0.1:1,replay=tcp://a:1", "either"),
            ("name=a,bind=tcp://0.0.0.0:1", "other machines"),
            ("name=a,connect=a:1", "no endpoint"),
            ("name=a,connect=tcp://a:1,hash=sha256", "`sha256` is no hash"),
            ("name=a,connect=tcp://a:1,hash=sglang,seed=1", "`seed` goes with"),
            ("name=a,connect=tcp://a:1,block=0", "from 1 to"),
            ("name=a,connect=tcp://a:1,name=b", "`name` is there twice"),
            ("name=a,port=1", "there is no `port`"),
            ("name", "form key=value"),
        ] {
            let error = line.parse::<Spec>().unwrap_err().to_string();
            assert!(error.contains(wanted), "{line}: {error}");
        }
    }

    /// A prompt without a whole block has no keys, whichever way it is hashed, and every way gives its own.
    #[test]
    fn each_hash_has_keys_of_its_own() {
        let ways = ["", ",hash=vllm-xxhash-cbor", ",hash=sglang", ",hash=dynamo", ",seed=0"];
        let tokens: Vec<u32> = (0..40).collect();
        let mut firsts = Vec::new();
        for way in ways {
            let spec: Spec = format!("name=a,connect=tcp://a:1{way}").parse().unwrap();
            assert!(spec.hash.keys(&tokens[..15], 16).is_empty() && spec.hash.keys(&tokens, 0).is_empty());
            let keys = spec.hash.keys(&tokens, 16);
            assert_eq!(keys.len(), 2, "{way}");
            firsts.push(keys[0]);
        }
        firsts.sort();
        firsts.dedup();
        assert_eq!(firsts.len(), ways.len());
    }
}
