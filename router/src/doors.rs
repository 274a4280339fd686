//! What other routers and operators ask for beside the OpenAI endpoints: posted
//! events, which blocks are there, and who holds a prompt.
//!
//! For programs on this machine, as the events of one caller decide what others are
//! told. The shapes are those of Dynamo: its `RouterEvent`s come in as they are, and
//! `/check_blocks` answers as its shared cache does.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, Path, Query, Request, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use terrace_index::events::decode_dynamo;

use crate::engines::spec::Spec;
use crate::error::ApiError;
use crate::http::{read_body, tokenize};
use crate::request::{Ask, Endpoint, Prompt};
use crate::serve::Router;
use crate::zmtp::MESSAGE_BYTES_MAX;

/// Longest list of hashes or blocks that is asked for at once.
pub const BLOCKS_MAX: usize = 1 << 20;
/// Most prefixes that are shown at once.
const PREFIXES_MAX: usize = 1000;
/// A million hashes of 20 digits, or as many blocks of tokens.
const CHECK_BYTES_MAX: usize = 64 << 20;

/// The body, if the caller is on this machine.
pub(crate) async fn local_body(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    if !peer.is_some_and(|ConnectInfo(address)| address.ip().is_loopback()) {
        let message = "this is answered to callers on this machine only";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message).code("loopback_only"));
    }
    let (parts, body) = request.into_parts();
    read_body(&parts.headers, body, limit).await
}

fn no_json(error: &serde_json::Error) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, format!("the body is not what is expected here: {error}"))
}

/// How posted blocks are named; what is left out is Dynamo's way.
#[derive(Debug, Deserialize)]
pub struct Way {
    hash: Option<String>,
    seed: Option<String>,
    block: Option<u32>,
}

/// `POST /events/dynamo`: one `RouterEvent` or a list of them, as `MessagePack`.
///
/// # Errors
/// 400 for bytes that are no events, 429 if there are too many workers.
pub async fn dynamo_events(
    State(router): State<Arc<Router>>,
    Query(way): Query<Way>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let body = local_body(request, MESSAGE_BYTES_MAX).await?;
    let bad = |what: &str, error: &dyn std::fmt::Display| {
        ApiError::new(StatusCode::BAD_REQUEST, format!("{what}: {error}")).code("bad_events")
    };
    let hash = way.hash.as_deref().unwrap_or("dynamo");
    let seed = way.seed.map(|seed| format!(",seed={seed}")).unwrap_or_default();
    let block = way.block.map(|block| format!(",block={block}")).unwrap_or_default();
    let line = format!("name=posted,connect=tcp://posted:1,hash={hash}{seed}{block}");
    let spec: Spec = line.parse().map_err(|error| bad("the query", &error))?;
    let events = decode_dynamo(&body).map_err(|error| bad("the body is no list of events", &error))?;
    let taken = router.index.engines().posted.take(&events, (spec.hash, spec.block_tokens));
    let tally = taken.map_err(|_| {
        ApiError::busy(
            "too many workers tell of their blocks; DELETE /events/dynamo/WORKER those that are gone",
        )
    })?;
    Ok(Json(json!({
        "applied": tally.applied,
        "repeated": tally.repeated,
        "gaps": tally.gaps,
        "ignored": tally.ignored,
    })))
}

/// `DELETE /events/dynamo/{worker}`: forgets a worker with all its ranks.
///
/// # Errors
/// 404 if nothing is known of it.
pub async fn dynamo_gone(
    State(router): State<Arc<Router>>,
    Path(worker): Path<u64>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    local_body(request, 0).await?;
    if !router.index.engines().posted.remove(worker) {
        let message = format!("worker {worker} holds nothing here");
        return Err(ApiError::new(StatusCode::NOT_FOUND, message).code("unknown_worker"));
    }
    Ok(Json(json!({"removed": true})))
}

/// What `/check_blocks` is asked.
#[derive(Debug, Deserialize)]
struct Check {
    block_hashes: Option<Vec<u64>>,
    tokens: Option<Vec<u32>>,
    block_size: Option<u32>,
    model: Option<String>,
    cache_namespace: Option<String>,
}

/// `POST /check_blocks`: which of these blocks some daemon holds, as half-open ranges of positions.
///
/// # Errors
/// 400 for a body that asks for nothing, or for too much.
pub async fn check_blocks(
    State(router): State<Arc<Router>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let body = local_body(request, CHECK_BYTES_MAX).await?;
    let check: Check = serde_json::from_slice(&body).map_err(|error| no_json(&error))?;
    drop(body);
    let too_many = |param, found: usize| {
        ApiError::bad(param, format!("{found} blocks are too many to ask for at once; at most {BLOCKS_MAX}"))
    };
    // Blocks of a namespace are named otherwise than by their tokens.
    let is_plain = check.cache_namespace.as_deref().unwrap_or("").is_empty();
    let model = check.model.as_deref();
    let held = match (check.block_hashes, check.tokens, check.block_size) {
        (Some(hashes), None, _) if hashes.len() > BLOCKS_MAX => {
            return Err(too_many("block_hashes", hashes.len()));
        }
        (Some(_), None, _) | (None, Some(_), Some(_)) if !is_plain => Vec::new(),
        (Some(hashes), None, _) => router.index.held_hashes(&hashes, model).await,
        (None, Some(tokens), Some(block)) if block > 0 => {
            let blocks = tokens.len() / block as usize;
            if blocks > BLOCKS_MAX {
                return Err(too_many("tokens", blocks));
            }
            router.index.held_tokens(&tokens, block, model).await
        }
        _ => {
            let message = "send `block_hashes`, or `tokens` and a `block_size` of at least 1";
            return Err(ApiError::bad("block_hashes", message));
        }
    };
    Ok(Json(json!({"ranges": ranges(&held)})))
}

/// The positions that are true.
fn ranges(held: &[bool]) -> Vec<[usize; 2]> {
    let mut ranges: Vec<[usize; 2]> = Vec::new();
    for position in (0..held.len()).filter(|position| held[*position]) {
        match ranges.last_mut() {
            Some(last) if last[1] == position => last[1] += 1,
            _ => ranges.push([position, position + 1]),
        }
    }
    ranges
}

/// `GET /dump`: everything that is published, as Dynamo's indexers give it to each other.
///
/// # Errors
/// 404 if nothing is published.
pub async fn dump(State(router): State<Arc<Router>>, request: Request) -> Result<Json<Value>, ApiError> {
    local_body(request, 0).await?;
    let nothing = || ApiError::new(StatusCode::NOT_FOUND, "nothing is published here; see --publish");
    let publisher = router.publisher.get().ok_or_else(nothing)?;
    Ok(Json(publisher.dump(&router.config)))
}

/// What `/admin/prefix` is asked, where tokens are given; else it is a request of the OpenAI endpoints.
#[derive(Debug, Deserialize)]
struct Tokens {
    tokens: Vec<u32>,
}

/// `POST /admin/prefix`: every holder of a prompt's beginning, longest first.
///
/// # Errors
/// What the OpenAI endpoint would answer to a prompt that cannot be read.
pub async fn prefix(State(router): State<Arc<Router>>, request: Request) -> Result<Json<Value>, ApiError> {
    let body = local_body(request, CHECK_BYTES_MAX).await?;
    let tokens = match serde_json::from_slice::<Tokens>(&body) {
        Ok(asked) => asked.tokens,
        Err(_) => {
            let value: Value = serde_json::from_slice(&body).map_err(|error| no_json(&error))?;
            let is_chat = value.get("messages").is_some();
            let ask = Ask::parse(if is_chat { Endpoint::Chat } else { Endpoint::Completions }, &body)?;
            let model = router.models.named(ask.model.as_deref())?;
            tokenize(&model, ask.prompt).await?
        }
    };
    if tokens.is_empty() {
        return Err(ApiError::bad(
            Prompt::Tokens(Vec::new()).param(),
            "the prompt is empty; send at least one token",
        ));
    }
    let daemons = router.index.daemon_prefixes(&tokens).await;
    let engines = router.index.engines().prefixes(&tokens);
    let daemons = daemons.iter().map(|prefix| (prefix, "daemon"));
    let mut holders: Vec<_> = daemons.chain(engines.iter().map(|prefix| (prefix, "engine"))).collect();
    let covered = |prefix: &crate::engines::Prefix| u64::from(prefix.blocks) * u64::from(prefix.block_tokens);
    holders.sort_by_key(|(prefix, _)| std::cmp::Reverse(covered(prefix)));
    let holders = holders.iter().map(|(prefix, kind)| {
        let [hbm, pinned, nvme] = prefix.fastest;
        json!({
            "name": prefix.name,
            "kind": kind,
            "blocks": prefix.blocks,
            "block_tokens": prefix.block_tokens,
            "tiers": {"hbm": hbm, "pinned": pinned, "nvme": nvme},
        })
    });
    Ok(Json(json!({"tokens": tokens.len(), "holders": holders.collect::<Vec<_>>()})))
}

/// How much of the index `/admin/hot` shows.
#[derive(Debug, Deserialize)]
pub struct Hot {
    limit: Option<usize>,
    parents: Option<bool>,
}

/// `GET /admin/hot`: the warmest prefixes of the index.
///
/// # Errors
/// 400 for a limit that is none, 500 if the index is broken.
pub async fn hot(
    State(router): State<Arc<Router>>,
    Query(hot): Query<Hot>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    local_body(request, 0).await?;
    let limit = hot.limit.unwrap_or(20);
    if !(1..=PREFIXES_MAX).contains(&limit) {
        return Err(ApiError::bad("limit", format!("`limit` must be from 1 to {PREFIXES_MAX}")));
    }
    let looking = Arc::clone(&router);
    let parents = hot.parents.unwrap_or(false);
    // Looks at the whole index.
    let found = tokio::task::spawn_blocking(move || looking.index.warmest(limit, parents)).await;
    let found = found.map_err(|error| {
        tracing::error!(%error, "looking for warm prefixes panicked");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the index could not be looked at; please report it")
    })?;
    let prefixes = found.iter().map(|(stretch, holders)| {
        let [hbm, pinned, nvme] = stretch.tiers;
        let first = stretch.first.to_bytes();
        json!({
            "number": stretch.number,
            "parent": stretch.parent,
            "first_block": first.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
            "blocks": stretch.blocks,
            "entries": stretch.entries,
            "tiers": {"hbm": hbm, "pinned": pinned, "nvme": nvme},
            "bytes_max": stretch.bytes_max,
            "heat": stretch.heat,
            "holders": holders,
            "holders_count": stretch.holders_count,
        })
    });
    Ok(Json(json!({
        "prefixes": prefixes.collect::<Vec<_>>(),
        "blocks_shown": found.iter().map(|(stretch, _)| u64::from(stretch.blocks)).sum::<u64>(),
        "blocks_in_all": router.index.blocks(),
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A range that is one too long would be credited for a block that nobody has.
    #[test]
    fn ranges_are_half_open_and_apart() {
        assert_eq!(ranges(&[]), Vec::<[usize; 2]>::new());
        assert_eq!(ranges(&[false, false]), Vec::<[usize; 2]>::new());
        assert_eq!(ranges(&[true, true, false, true]), [[0, 2], [3, 4]]);
        assert_eq!(ranges(&[false, true]), [[1, 2]]);
    }
}
