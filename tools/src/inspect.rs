//! `inspect`: what lies on devices and in the catalog, while no daemon runs.
//! Nothing is changed.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use terrace_core::{BlockHeader, BlockId, DeviceId, SpaceId};
use terrace_media::inspect::{
    CatalogReport, CheckOptions, CheckReport, EntryFilter, Finding, FindingKind, FrameReport, OfflineCatalog,
    OfflineDevice, check,
};
use terrace_media::{BadHeader, CopyState, FoundHeader, MediaError, SlotHeader, SuperblockFacts};

use crate::block::parse_id;
use crate::output::{self, Format};

/// What to look at.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Both copies of a device's superblock
    Superblock {
        /// A data file or raw device
        path: PathBuf,
    },
    /// What the catalog of a data directory knows
    Catalog(CatalogArgs),
    /// One frame of a device: its header page, and whether its payload matches
    Frame {
        /// A data file or raw device
        path: PathBuf,
        /// Slot
        #[arg(long)]
        slot: u32,
        /// Frame in the slot
        #[arg(long)]
        index: u32,
    },
    /// Every slot and frame of a device, or of all devices of a data directory and its catalog. Exit code 1 if
    /// something is damaged
    Scan(ScanArgs),
}

/// Which entries of the catalog.
#[derive(Debug, Args)]
pub(crate) struct CatalogArgs {
    /// A data directory
    data_dir: PathBuf,
    /// List entries of this space
    #[arg(long, value_parser = parse_id)]
    space: Option<[u8; 16]>,
    /// List the entry of this block
    #[arg(long, value_parser = parse_id)]
    block: Option<[u8; 16]>,
    /// List entries on this device, a number
    #[arg(long)]
    device: Option<u16>,
    /// List entries in this slot
    #[arg(long)]
    slot: Option<u32>,
    /// Most entries that are listed
    #[arg(long, default_value_t = 20)]
    limit: usize,
}

/// What to scan.
#[derive(Debug, Args)]
pub(crate) struct ScanArgs {
    /// A data file, a raw device, or a data directory
    path: PathBuf,
    /// A device of the data directory that lies elsewhere; may be repeated
    #[arg(long)]
    device: Vec<PathBuf>,
    /// Read and compare payloads as well
    #[arg(long)]
    payloads: bool,
    /// Most findings of each kind that are listed
    #[arg(long, default_value_t = 10)]
    limit: usize,
}

pub(crate) fn run(command: Command, format: Format) -> anyhow::Result<ExitCode> {
    let shown = match command {
        Command::Superblock { path } => superblock(&path, format),
        Command::Catalog(args) => catalog(&args, format),
        Command::Frame { path, slot, index } => frame(&path, slot, index, format),
        Command::Scan(args) => scan(&args, format),
    };
    // Its words end with their cause, which would follow once more.
    shown.map_err(|error| match error.downcast::<MediaError>() {
        Ok(error) => anyhow!("{error}"),
        Err(error) => error,
    })
}

fn superblock(path: &Path, format: Format) -> anyhow::Result<ExitCode> {
    let device = OfflineDevice::open(path)?;
    let good = device.superblock.is_some();
    if format == Format::Json {
        let copies: Vec<Value> = device.copies().iter().map(copy_json).collect();
        output::json(&json!({ "path": path, "valid": good, "copies": copies }))?;
    } else {
        for (name, copy) in ["A", "B"].iter().zip(device.copies()) {
            let counts = good && copy.facts() == device.superblock.as_ref();
            println!("copy {name}: {}{}", copy_words(copy), if counts { ", this one counts" } else { "" });
            if let Some(facts) = copy.facts() {
                print_facts(facts);
            }
        }
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn copy_words(copy: &CopyState) -> String {
    match copy {
        CopyState::Valid(facts) => format!("valid, sequence {}", facts.sequence),
        CopyState::Newer(found) => format!("of format {found}, which this Terrace does not know"),
        CopyState::Damaged => "damaged".to_owned(),
        CopyState::Empty => "empty".to_owned(),
        CopyState::Foreign => "not a Terrace superblock".to_owned(),
    }
}

fn print_facts(facts: &SuperblockFacts) {
    println!("  device      {}", output::hex(&facts.uuid));
    println!("  node        {}", output::hex(&facts.node));
    println!("  slots       {} of {}", facts.slots, output::bytes(facts.chunk_bytes.get()));
    println!("  life        {}", facts.incarnation);
    println!("  cleared     {} spaces", facts.cleared.len());
    for (_, space, lowest) in &facts.cleared {
        println!("    space {space}: generations below {lowest} are void");
    }
}

fn copy_json(copy: &CopyState) -> Value {
    let state = match copy {
        CopyState::Valid(_) => "valid",
        CopyState::Newer(_) => "newer",
        CopyState::Damaged => "damaged",
        CopyState::Empty => "empty",
        CopyState::Foreign => "foreign",
    };
    let facts = copy.facts().map(|facts| {
        let cleared = facts.cleared.iter().map(|(tenant, space, lowest)| {
            json!({
                "tenant_id": output::hex(&tenant.to_bytes()), "space_id": space.to_string(),
                "lowest_generation": lowest,
            })
        });
        json!({
            "uuid": output::hex(&facts.uuid),
            "node": output::hex(&facts.node),
            "chunk_bytes": facts.chunk_bytes.get(),
            "slots": facts.slots,
            "incarnation": facts.incarnation,
            "sequence": facts.sequence,
            "cleared": cleared.collect::<Vec<_>>(),
        })
    });
    json!({ "state": state, "format": copy.newer(), "superblock": facts })
}

fn catalog(args: &CatalogArgs, format: Format) -> anyhow::Result<ExitCode> {
    let catalog = OfflineCatalog::open(&args.data_dir)?;
    let filter = EntryFilter {
        space: args.space.map(SpaceId::from_bytes),
        block: args.block.map(BlockId::from_bytes),
        device: args.device.map(DeviceId::new),
        slot: args.slot,
    };
    if args.space.is_some() || args.block.is_some() || args.device.is_some() || args.slot.is_some() {
        let entries = catalog.entries(&filter, args.limit)?;
        match format {
            Format::Json => output::json(&Value::Array(entries.iter().map(entry_json).collect()))?,
            Format::Table => print_entries(&entries),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let report = catalog.report()?;
    match format {
        Format::Json => output::json(&catalog_json(&report))?,
        Format::Table => print_catalog(&report, &args.data_dir),
    }
    Ok(ExitCode::SUCCESS)
}

fn catalog_json(report: &CatalogReport) -> Value {
    let blocks: u64 = report.blocks.values().map(|(count, _)| count).sum();
    let devices = report.devices.iter().map(|(id, uuid)| (id.to_string(), json!(output::hex(uuid))));
    let spaces = report.blocks.keys().chain(report.spaces.keys()).collect::<std::collections::BTreeSet<_>>();
    let spaces = spaces.into_iter().map(|space| {
        let record = report.spaces.get(space);
        let (count, bytes) = report.blocks.get(space).copied().unwrap_or_default();
        json!({
            "space_id": space.to_string(), "known": record.is_some(),
            "tenant": record.map(|record| record.tenant_name.clone()),
            "generation": record.map(|record| record.generation),
            "manifest_bytes": record.map(|record| record.manifest.len()),
            "blocks": count, "bytes": bytes.get(),
        })
    });
    let carves = report.carves.iter().map(|(carve, sequence)| {
        json!({
            "device": carve.device.get(), "slot": carve.slot, "space_id": carve.space.to_string(),
            "frame_bytes": carve.frame_bytes.get(), "carve_sequence": sequence,
        })
    });
    json!({
        "format": format!("{}.{}", report.format.0, report.format.1),
        "incarnation": report.incarnation,
        "clean": report.clean,
        "rebuild": report.rebuild,
        "devices": devices.collect::<serde_json::Map<_, _>>(),
        "blocks": blocks,
        "spaces": spaces.collect::<Vec<_>>(),
        "carves": carves.collect::<Vec<_>>(),
    })
}

fn print_catalog(report: &CatalogReport, data_dir: &Path) {
    let blocks: u64 = report.blocks.values().map(|(count, _)| count).sum();
    println!("catalog of {}, format {}.{}", data_dir.display(), report.format.0, report.format.1);
    println!(
        "last opened by life {}, which {}",
        report.incarnation,
        if report.clean { "ended cleanly" } else { "did not end cleanly" }
    );
    if report.rebuild {
        println!("incomplete: the next start scans the devices");
    }
    for (device, uuid) in &report.devices {
        println!("device {device} is {}", output::hex(uuid));
    }
    println!("{} carved slots, {blocks} blocks\n", report.carves.len());
    let mut table = output::table(&["SPACE", "TENANT", ">GENERATION", ">SLOTS", ">BLOCKS", ">BYTES"]);
    for (space, record) in &report.spaces {
        let (count, bytes) = report.blocks.get(space).copied().unwrap_or_default();
        let slots = report.carves.iter().filter(|(carve, _)| carve.space == *space).count();
        table.add_row([
            space.to_string(),
            record.tenant_name.clone(),
            record.generation.to_string(),
            slots.to_string(),
            count.to_string(),
            output::bytes(bytes.get()),
        ]);
    }
    output::print(&table);
    for (space, (count, _)) in report.blocks.iter().filter(|(space, _)| !report.spaces.contains_key(space)) {
        println!("{count} blocks belong to space {space}, of which no record is there");
    }
}

fn print_entries(entries: &[FoundHeader]) {
    if entries.is_empty() {
        println!("no such entry");
        return;
    }
    for entry in entries {
        let (frame, stats) = (entry.frame, entry.stats);
        println!("block {}", entry.header.block);
        println!("  frame       device {}, slot {}, index {}", frame.device, frame.slot, frame.index);
        print_header(&entry.header);
        println!("  use         depth {}, turn {}, used {} times", stats.depth, stats.turn, stats.uses);
    }
}

fn print_header(header: &BlockHeader) {
    println!("  space       {}", header.space);
    if let Some(parent) = header.parent {
        println!("  parent      {parent}");
    }
    println!("  length      {}", output::bytes(header.length.get()));
    println!("  checksum    {:016x}", header.checksum.get());
    println!("  generation  {}", header.generation);
    println!("  written     {}", header.write_sequence);
}

fn header_json(header: &BlockHeader) -> Value {
    json!({
        "block_id": header.block.to_string(),
        "space_id": header.space.to_string(),
        "tenant_id": output::hex(&header.tenant.to_bytes()),
        "parent_id": header.parent.map(|parent| parent.to_string()),
        "length": header.length.get(),
        "checksum": format!("{:016x}", header.checksum.get()),
        "generation": header.generation,
        "write_sequence": header.write_sequence,
    })
}

fn entry_json(entry: &FoundHeader) -> Value {
    let (frame, stats) = (entry.frame, entry.stats);
    json!({
        "device": frame.device.get(), "slot": frame.slot, "index": frame.index,
        "header": header_json(&entry.header),
        "depth": stats.depth, "turn": stats.turn, "uses": stats.uses,
    })
}

fn frame(path: &Path, slot: u32, index: u32, format: Format) -> anyhow::Result<ExitCode> {
    let report = OfflineDevice::open(path)?.frame(slot, index)?;
    match format {
        Format::Json => output::json(&json!({
            "path": path, "slot": slot, "index": index, "offset": report.offset,
            "slot_header": result_json(&report.slot, slot_json),
            "header": report.header.as_ref().map(|header| result_json(header, header_json)),
            "payload_matches": report.payload,
        }))?,
        Format::Table => print_frame(&report, slot, index),
    }
    let damaged = report.payload == Some(false)
        || matches!(report.header, Some(Err(error)) if !matches!(error, BadHeader::Empty | BadHeader::Magic))
        || matches!(report.slot, Err(error) if error != BadHeader::Empty);
    Ok(if damaged { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn result_json<T>(found: &Result<T, BadHeader>, show: impl Fn(&T) -> Value) -> Value {
    match found {
        Ok(found) => show(found),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

fn slot_json(slot: &SlotHeader) -> Value {
    json!({
        "slot": slot.slot,
        "space_id": slot.space.to_string(),
        "tenant": slot.tenant_name,
        "frame_bytes": slot.frame_bytes.get(),
        "carve_sequence": slot.carve_sequence,
        "generation": slot.generation,
        "manifest_bytes": slot.manifest.len(),
    })
}

fn print_frame(report: &FrameReport, slot: u32, index: u32) {
    match &report.slot {
        Ok(found) => println!(
            "slot {slot}: space {}, frames of {}, carving {}{}",
            found.space,
            output::bytes(found.frame_bytes.get()),
            found.carve_sequence,
            if found.slot == slot { "" } else { "; THE HEADER OF ANOTHER SLOT" }
        ),
        Err(error) => println!("slot {slot}: {error}"),
    }
    let Some(header) = &report.header else { return };
    let offset = report.offset.unwrap_or_default();
    match header {
        Err(error) => println!("frame {index} at byte {offset}: {error}"),
        Ok(header) => {
            println!("frame {index} at byte {offset}: block {}", header.block);
            print_header(header);
            let verdict = if report.payload == Some(true) { "matches" } else { "DOES NOT MATCH: damaged" };
            println!("  payload     {verdict}");
        }
    }
}

fn scan(args: &ScanArgs, format: Format) -> anyhow::Result<ExitCode> {
    let (catalog, paths) = if args.path.is_dir() {
        let mut paths = devices_in(&args.path)?;
        paths.extend(args.device.iter().cloned());
        ensure!(!paths.is_empty(), "no nvme*.dat in {}; name its devices by --device", args.path.display());
        (Some(OfflineCatalog::open(&args.path)?), paths)
    } else {
        if !args.device.is_empty() {
            bail!("--device goes with a data directory; {} is none", args.path.display());
        }
        (None, vec![args.path.clone()])
    };
    let devices: Vec<OfflineDevice> =
        paths.iter().map(|path| OfflineDevice::open(path)).collect::<Result<_, _>>()?;
    let options = CheckOptions { payloads: args.payloads, findings_max: args.limit };
    let report = check(&devices, catalog.as_ref(), options)?;
    match format {
        Format::Json => output::json(&scan_json(&report, &paths))?,
        Format::Table => print_scan(&report, &paths),
    }
    Ok(if report.is_damaged() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn devices_in(data_dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(data_dir).with_context(|| format!("cannot read {}", data_dir.display()))?;
    let mut paths = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let ours = name.to_str().is_some_and(|name| name.starts_with("nvme") && name.ends_with(".dat"));
        if ours {
            paths.push(data_dir.join(name));
        }
    }
    paths.sort();
    Ok(paths)
}

fn finding_json(finding: &Finding, paths: &[PathBuf]) -> Value {
    json!({
        "kind": finding.kind.label(),
        "damage": finding.kind.is_damage(),
        "device": paths.get(finding.device),
        "slot": finding.slot,
        "index": finding.index,
        "block_id": finding.block.map(|block| block.to_string()),
        "detail": finding.detail,
    })
}

fn scan_json(report: &CheckReport, paths: &[PathBuf]) -> Value {
    let counts = report.counts.iter().map(|(kind, count)| (kind.label().to_owned(), json!(count)));
    json!({
        "damaged": report.is_damaged(),
        "slots": report.slots, "carved": report.carved, "frames": report.frames, "blocks": report.blocks,
        "entries": report.entries,
        "counts": counts.collect::<serde_json::Map<_, _>>(),
        "findings": report.findings.iter().map(|finding| finding_json(finding, paths)).collect::<Vec<_>>(),
    })
}

fn print_scan(report: &CheckReport, paths: &[PathBuf]) {
    println!(
        "{} slots, {} carved; {} frames, {} with a valid header",
        report.slots, report.carved, report.frames, report.blocks
    );
    if let Some(entries) = report.entries {
        println!("{entries} entries of the catalog");
    }
    let words = if report.is_damaged() { "DAMAGE was found" } else { "no damage" };
    println!("{words}\n");
    let mut table = output::table(&["FINDING", ">COUNT", "MEANS"]);
    for kind in FindingKind::ALL {
        if let Some(count) = report.counts.get(&kind) {
            let means = if kind.is_damage() { "damage" } else { "ordinary" };
            table.add_row([kind.label().to_owned(), count.to_string(), means.to_owned()]);
        }
    }
    if !report.counts.is_empty() {
        output::print(&table);
    }
    for finding in &report.findings {
        let path = paths.get(finding.device).map(|path| path.display().to_string()).unwrap_or_default();
        let index = finding.index.map_or(String::new(), |index| format!(", frame {index}"));
        let block = finding.block.map_or(String::new(), |block| format!(", block {block}"));
        println!("{}: {path} slot {}{index}{block}: {}", finding.kind.label(), finding.slot, finding.detail);
    }
}
