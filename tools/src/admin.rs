//! `info`, `tier ls`, `lease ls`, `space ls` and `flush`.

use std::process::ExitCode;

use serde_json::{Value, json};
use terrace_proto::v1::{
    self, FlushRequest, InfoRequest, ListLeasesRequest, ListSpacesRequest, SpaceKind, Tier, TierInfo,
};

use crate::cli::Target;
use crate::connect::{admin, refused};
use crate::output::{self, Format};

/// What `info` and `doctor` say of a daemon whose catalog failed.
pub(crate) const DEGRADED: &str =
    "DEGRADED: the catalog takes no writes; blocks are served, none is persisted";

/// The word for a tier.
pub(crate) fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Unspecified => "?",
        Tier::Hbm => "Hbm",
        Tier::Pinned => "Pinned",
        Tier::Nvme => "Nvme",
        Tier::Remote => "Remote",
    }
}

pub(crate) async fn info(target: &Target, format: Format) -> anyhow::Result<ExitCode> {
    let info = admin(target).await?.info(InfoRequest {}).await.map_err(refused)?.into_inner();
    match format {
        Format::Json => output::json(&info_json(&info))?,
        Format::Table => print_info(&info),
    }
    Ok(ExitCode::SUCCESS)
}

fn print_info(info: &v1::InfoResponse) {
    println!(
        "terraced {}, pid {}, life {}, up {}, ready after {}",
        info.version,
        info.pid,
        info.incarnation,
        output::duration(info.uptime_ms),
        output::duration(info.ready_ms)
    );
    println!("data in {}", info.data_dir);
    println!(
        "{} sessions, {} leases, {} only in memory (a crash now would lose them)",
        info.sessions,
        info.leases,
        output::bytes(info.unpersisted_bytes)
    );
    if info.degraded {
        println!("{DEGRADED}");
    }
    if info.scan_done < 1.0 {
        println!("rebuilding the catalog from the devices: {:.0} % done", info.scan_done * 100.0);
    }
    println!();
    print_tiers(&info.tiers);
    println!();
    print_frames(&info.tiers);
    if !info.notes.is_empty() {
        println!("\nThis machine:");
        for note in &info.notes {
            println!("- {note}");
        }
    }
}

fn print_tiers(tiers: &[TierInfo]) {
    let mut table = output::table(&["TIER", "FULL", ">SEALED", ">SIZE", ">POPULATED", ">WASTED"]);
    for tier in tiers.iter().filter(|tier| tier.on) {
        table.add_row([
            tier_name(tier.tier()).to_owned(),
            output::bar(tier.sealed_bytes, tier.capacity_bytes),
            output::bytes(tier.sealed_bytes),
            output::bytes(tier.capacity_bytes),
            output::bytes(tier.populated_bytes),
            output::bytes(tier.stranded_bytes),
        ]);
    }
    output::print(&table);
    tiers.iter().for_each(|tier| println!("{}", tier_words(tier)));
}

/// A tier's device, how it is driven, and what there is to say of it.
pub(crate) fn tier_words(tier: &TierInfo) -> String {
    let name = tier_name(tier.tier());
    let parts: Vec<&str> = [&tier.device, &tier.backend, &tier.note]
        .into_iter()
        .map(String::as_str)
        .filter(|part| !part.is_empty())
        .collect();
    let state = if tier.on || tier.note.contains("off") { "" } else { "off: " };
    format!("{name}: {state}{}", parts.join("; "))
}

fn print_frames(tiers: &[TierInfo]) {
    let mut table = output::table(&[
        "FRAMES", ">ALL", ">FREE", ">FILLING", ">SEALED", ">PINNED", ">EVICT", ">QUAR", ">CHUNKS", ">WINDOWS",
    ]);
    for tier in tiers.iter().filter(|tier| tier.on) {
        let frames = tier.frames.unwrap_or_default();
        let mut row = vec![tier_name(tier.tier()).to_owned()];
        let counts = [
            frames.capacity,
            frames.free,
            frames.filling,
            frames.sealed,
            frames.pinned,
            frames.evicting,
            frames.quarantined,
            u64::from(tier.chunks),
            u64::from(tier.windows),
        ];
        row.extend(counts.map(|count| count.to_string()));
        table.add_row(row);
    }
    output::print(&table);
}

fn tier_json(tier: &TierInfo) -> Value {
    let frames = tier.frames.unwrap_or_default();
    json!({
        "tier": tier_name(tier.tier()),
        "on": tier.on,
        "device": tier.device,
        "backend": tier.backend,
        "note": tier.note,
        "capacity_bytes": tier.capacity_bytes,
        "populated_bytes": tier.populated_bytes,
        "sealed_bytes": tier.sealed_bytes,
        "stranded_bytes": tier.stranded_bytes,
        "chunks": tier.chunks,
        "windows": tier.windows,
        "frames": {
            "capacity": frames.capacity,
            "free": frames.free,
            "filling": frames.filling,
            "sealed": frames.sealed,
            "pinned": frames.pinned,
            "evicting": frames.evicting,
            "quarantined": frames.quarantined,
        },
    })
}

fn info_json(info: &v1::InfoResponse) -> Value {
    let mut counters: Vec<_> = info.counters.iter().collect();
    counters.sort();
    json!({
        "version": info.version,
        "pid": info.pid,
        "incarnation": info.incarnation,
        "uptime_ms": info.uptime_ms,
        "ready_ms": info.ready_ms,
        "data_dir": info.data_dir,
        "sessions": info.sessions,
        "leases": info.leases,
        "unpersisted_bytes": info.unpersisted_bytes,
        "degraded": info.degraded,
        "scan_done": info.scan_done,
        "tiers": info.tiers.iter().map(tier_json).collect::<Vec<_>>(),
        "notes": info.notes,
        "counters": counters.into_iter().map(|(name, value)| (name.clone(), json!(value)))
            .collect::<serde_json::Map<_, _>>(),
    })
}

pub(crate) async fn tiers(target: &Target, format: Format) -> anyhow::Result<ExitCode> {
    let info = admin(target).await?.info(InfoRequest {}).await.map_err(refused)?.into_inner();
    match format {
        Format::Json => output::json(&Value::Array(info.tiers.iter().map(tier_json).collect()))?,
        Format::Table => print_tiers(&info.tiers),
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn leases(target: &Target, format: Format) -> anyhow::Result<ExitCode> {
    let request = ListLeasesRequest { limit: 0 };
    let answer = admin(target).await?.list_leases(request).await.map_err(refused)?.into_inner();
    if format == Format::Json {
        let leases = answer.leases.iter().map(|lease| {
            json!({
                "lease": lease.lease, "kind": lease.kind, "client": lease.client, "tenant": lease.tenant,
                "blocks": lease.blocks, "held_ms": lease.held_ms, "expires_ms": lease.expires_ms,
            })
        });
        output::json(&json!({ "total": answer.total, "leases": leases.collect::<Vec<_>>() }))?;
        return Ok(ExitCode::SUCCESS);
    }
    if answer.leases.is_empty() {
        println!("no leases");
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = output::table(&[">LEASE", "KIND", "CLIENT", "TENANT", ">BLOCKS", ">HELD", ">EXPIRES IN"]);
    for lease in &answer.leases {
        table.add_row([
            lease.lease.to_string(),
            lease.kind.clone(),
            lease.client.clone(),
            lease.tenant.clone(),
            lease.blocks.to_string(),
            output::duration(lease.held_ms),
            output::duration(lease.expires_ms),
        ]);
    }
    output::print(&table);
    let shown = u32::try_from(answer.leases.len()).unwrap_or(u32::MAX);
    if answer.total > shown {
        println!("and {} more", answer.total - shown);
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn spaces(target: &Target, format: Format) -> anyhow::Result<ExitCode> {
    let answer = admin(target).await?.list_spaces(ListSpacesRequest {}).await.map_err(refused)?.into_inner();
    if format == Format::Json {
        output::json(&Value::Array(answer.spaces.iter().map(space_json).collect()))?;
        return Ok(ExitCode::SUCCESS);
    }
    if answer.spaces.is_empty() {
        println!("no spaces");
    }
    for space in &answer.spaces {
        println!("space {}", output::hex(&space.space_id));
        let tenant = if space.tenant.is_empty() { "not known until it opens it" } else { &space.tenant };
        println!("  tenant      {tenant}");
        if let Some(manifest) = &space.manifest {
            println!("  model       {}", manifest.model);
            println!("  layout      {} {} ({})", manifest.dtype, manifest.layout, manifest.engine);
            println!(
                "  blocks of   {} tokens, {}",
                manifest.tokens_per_block,
                output::bytes(manifest.block_bytes)
            );
        } else {
            println!("  manifest    not known until a client opens it");
        }
        println!("  generation  {}", space.generation);
        println!("  holds       {} blocks in Pinned, {} in Nvme", space.pinned_blocks, space.nvme_blocks);
    }
    Ok(ExitCode::SUCCESS)
}

fn space_json(space: &v1::SpaceInfo) -> Value {
    let manifest = space.manifest.as_ref().map(|manifest| {
        let kind = match manifest.kind() {
            SpaceKind::Unspecified => "unspecified",
            SpaceKind::Chain => "chain",
            SpaceKind::Window => "window",
            SpaceKind::State => "state",
        };
        json!({
            "model": manifest.model,
            "model_fingerprint": output::hex(&manifest.model_fingerprint),
            "weights_generation": manifest.weights_generation,
            "dtype": manifest.dtype,
            "layout": manifest.layout,
            "tokens_per_block": manifest.tokens_per_block,
            "block_bytes": manifest.block_bytes,
            "kind": kind,
            "group": manifest.group,
            "topology": manifest.topology,
            "rank": manifest.rank,
            "engine": manifest.engine,
        })
    });
    json!({
        "space_id": output::hex(&space.space_id),
        "tenant": space.tenant,
        "manifest": manifest,
        "generation": space.generation,
        "pinned_blocks": space.pinned_blocks,
        "nvme_blocks": space.nvme_blocks,
    })
}

pub(crate) async fn flush(target: &Target, format: Format) -> anyhow::Result<ExitCode> {
    let answer = admin(target).await?.flush(FlushRequest {}).await.map_err(refused)?.into_inner();
    match format {
        Format::Json => output::json(&json!({ "blocks": answer.blocks, "failed": answer.failed }))?,
        Format::Table if answer.failed == 0 => {
            println!("durable: {} blocks were still to be written", answer.blocks);
        }
        Format::Table => println!(
            "{} blocks written, {} could not be: see `terrace info` and the daemon's log",
            answer.blocks, answer.failed
        ),
    }
    Ok(if answer.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
