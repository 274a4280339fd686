//! Tasks beside the requests: ticks, memory, and the repair of the catalog.

use std::sync::Arc;
use std::time::Duration;

use terrace_core::{ByteCount, Input, MIB};
use terrace_media::CatalogError;

use crate::engine::Engine;
use crate::restore;
use crate::status::Status;

/// How often the machine's memory is looked at.
const MEMORY_PERIOD: Duration = Duration::from_secs(1);
/// The machine keeps this much for everything else.
const HEADROOM_BYTES: u64 = 256 * MIB;
/// First and longest pause between two tries to repair the catalog.
const REPAIR_PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// Pause before the next look at a disk that is full.
const NO_ROOM_PAUSE: Duration = Duration::from_millis(500);

/// Tells the core how much memory chunks may take, whenever that changes.
/// Chunks that a dead daemon's clients still map come back to the machine when
/// they end, so the pool grows by itself after a restart.
pub(crate) async fn watch_memory(engine: Arc<Engine>, pinned: ByteCount, chunk: ByteCount) {
    let mut told = pinned;
    loop {
        let facts = engine.media().facts();
        let (lingering, ready) = (facts.lingering.get(), facts.ready.get());
        let existing = engine.view(|core| core.tier_views().pinned.bytes.get());
        let free = terrace_media::memory_available().get().saturating_sub(HEADROOM_BYTES);
        let limit =
            pinned.get().saturating_sub(lingering).min(existing.saturating_add(free).saturating_add(ready));
        let limit = ByteCount::new(limit - limit % chunk.get());
        engine.media().set_memory_max(limit);
        if limit != told {
            tracing::info!(bytes = limit.get(), lingering, "memory for chunks");
            engine.submit(Input::MemoryLimit { bytes: limit });
            told = limit;
        }
        tokio::time::sleep(MEMORY_PERIOD).await;
    }
}

/// Reopens the catalog after a failure, with growing pauses, until it works. One that is damaged is replaced
/// by a new one, and the devices are scanned for what it knew.
pub(crate) async fn repair_catalog(engine: Arc<Engine>, status: Arc<Status>, device_slots: Vec<u32>) {
    loop {
        engine.in_trouble().await;
        let mut pause = REPAIR_PAUSE.0;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(REPAIR_PAUSE.1);
            let trying = engine.clone();
            let repaired = tokio::task::spawn_blocking(move || repair(&trying)).await;
            match repaired {
                Ok(Ok(Repaired::Reopened)) => break,
                Ok(Ok(Repaired::Renewed)) => {
                    restore::unscanned(&engine, &device_slots);
                    let (engine, status, device_slots) =
                        (engine.clone(), status.clone(), device_slots.clone());
                    tokio::task::spawn_blocking(move || {
                        restore::scan_to_the_end(&engine, &status, &device_slots);
                    });
                    break;
                }
                Ok(Err(error @ CatalogError::NoRoom { .. })) => {
                    // To look for room costs nothing: durability comes back soon after it does.
                    pause = NO_ROOM_PAUSE;
                    tracing::debug!(%error, "the catalog is still not usable");
                }
                Ok(Err(error)) => tracing::warn!(%error, "the catalog is still not usable"),
                Err(error) => tracing::error!(%error, "repairing the catalog panicked"),
            }
        }
        tracing::info!("the catalog takes writes again");
        engine.catalog_repaired();
    }
}

/// How a catalog was brought back.
enum Repaired {
    /// All that it knew is there.
    Reopened,
    /// It is new, and knows the spaces.
    Renewed,
}

fn repair(engine: &Engine) -> Result<Repaired, CatalogError> {
    let repaired = match engine.media().reopen_catalog() {
        Ok(()) => Repaired::Reopened,
        Err(error) if error.is_damage() => {
            tracing::error!(%error, "the catalog is damaged; a new one takes its place");
            engine.media().renew_catalog()?;
            Repaired::Renewed
        }
        Err(error) => return Err(error),
    };
    // Spaces that were opened meanwhile are not in it yet.
    for (space, _) in engine.spaces().all() {
        if let Some(record) = engine.spaces().record(space) {
            engine.media().put_space(record)?;
        }
    }
    Ok(repaired)
}
