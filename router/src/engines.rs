//! What engines tell of their own caches: vLLM's and SGLang's events over ZeroMQ,
//! and Dynamo's over HTTP.
//!
//! Every publisher is a holder of the router's index, beside the daemons. Its blocks
//! are named by its own 64-bit hashes, as aliases: a look-up hashes the prompt as that
//! engine does ([`spec`]). [`follow`] has the sockets, [`publisher`] decides what of a
//! stream may be applied, [`dynamo`] takes what is posted, [`holders`] hands out numbers.
//!
//! Promises: what was missed is asked for again, and where it cannot be had the
//! publisher's blocks are forgotten rather than believed; memory is bounded whatever
//! a publisher sends. An alias says where blocks probably are. It never decides which
//! bytes are served.

use std::sync::Arc;

use terrace_index::{Found, HolderId, Index as Blocks};
use tokio::task::AbortHandle;

pub(crate) mod dynamo;
mod follow;
mod gauges;
mod holders;
mod publisher;
pub mod spec;

use crate::config::Config;
use crate::names::Names;
use dynamo::Posted;
use gauges::Gauges;
pub use holders::ENGINE_HOLDERS_MAX;
use holders::Holders;
use publisher::Shown;
use spec::Spec;

/// All publishers.
#[derive(Debug)]
pub struct Engines {
    blocks: Arc<Blocks>,
    engines: Vec<Engine>,
    holders: Arc<Holders>,
    /// What Dynamo's workers have posted.
    pub(crate) posted: Posted,
    gauges: Gauges,
}

/// One engine that is followed.
#[derive(Debug)]
struct Engine {
    spec: Arc<Spec>,
    shown: Arc<Shown>,
    follower: AbortHandle,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

/// What one publisher holds of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The holder's name.
    pub name: String,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Blocks of the longest prefix.
    pub blocks: u32,
    /// The same by the fastest tier that has them: `Hbm`, `Pinned`, `Nvme`.
    pub fastest: [u32; 3],
}

impl Engines {
    /// Follows every engine in the background, with holders from `first` on. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// When two metrics have one name, which a test rules out.
    pub(crate) fn start(
        config: &Config,
        blocks: Arc<Blocks>,
        first: u32,
        names: &Arc<Names>,
    ) -> Result<Self, prometheus::Error> {
        let holders = Arc::new(Holders::new(Arc::clone(&blocks), first, Arc::clone(names)));
        let engines = config.engines.iter().map(|spec| {
            let (spec, shown) = (Arc::new(spec.clone()), Arc::new(Shown::default()));
            let following = follow::follow(
                Arc::clone(&spec),
                Arc::clone(&holders),
                Arc::clone(&shown),
                config.engine_lost,
            );
            Engine { spec, shown, follower: tokio::spawn(following).abort_handle() }
        });
        let engines = engines.collect();
        let posted = Posted::new(Arc::clone(&holders));
        Ok(Self { blocks, engines, holders, posted, gauges: Gauges::new()? })
    }

    /// What the publishers hold of a prompt, longest first. Only those of which a hash and a block size are
    /// known can be asked.
    pub fn prefixes(&self, tokens: &[u32]) -> Vec<Prefix> {
        let mut found = Found::new();
        let mut prefixes = Vec::new();
        let mut asked: Vec<(spec::Hash, u32)> = Vec::new();
        let known = self.engines.iter().map(|engine| (engine.spec.hash.clone(), engine.spec.block_tokens));
        for (hash, block_tokens) in known.chain(self.posted.ways()) {
            if asked.contains(&(hash.clone(), block_tokens)) {
                continue;
            }
            self.blocks.find(&hash.keys(tokens, block_tokens), &mut found);
            for held in found.holders().iter().filter(|held| held.prefix[2] > 0) {
                // Daemons have no aliases, so whoever is found by one is a publisher.
                let Some(name) = self.holders.name(held.holder) else { continue };
                let (blocks, fastest) = (held.prefix[2], held.fastest);
                prefixes.push(Prefix { name, block_tokens, blocks, fastest });
            }
            asked.push((hash, block_tokens));
        }
        prefixes.sort_by(|one, two| (two.blocks, &one.name).cmp(&(one.blocks, &two.name)));
        prefixes
    }

    /// Who has a number in the index, if it is a publisher.
    pub(crate) fn holder_name(&self, holder: HolderId) -> Option<String> {
        self.holders.name(holder)
    }

    /// The Prometheus text of the publishers.
    ///
    /// # Errors
    /// When a metric cannot be written, which a test rules out.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let rows = self.engines.iter().map(|engine| (engine.spec.name.as_str(), engine.shown.row()));
        self.gauges.text(rows, self.holders.count())
    }
}
