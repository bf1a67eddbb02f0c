-- Gives up to n tasks to one instance: read, acknowledged, deleted, recorded and leased in
-- this one step, so that a task is always either waiting or in somebody's hands.
-- ARGV: group, instance, incarnation, lease_ms, n, daemon, then queue, weight, …
-- Without queues it gives only what has a container on the daemon.
-- Order: the daemon's inbox; then the queues by weight. In a queue's turn what came back
-- (`ready`) goes first, by time of acceptance, and then its stream.
-- A task that killed its owners is given only to an instance that holds no other such one, and one
-- that was given back for a daemon only to an instance there, for a moment.
-- Returns per task {id, queue, owner, fence, attempt, document, source, oversize, traceparent,
--   tracestate, accepted, app_failures, infra_failures, cancel, cause, daemon, container, ran, fields};
--   `fields` is the raw entry of a task that nobody has validated yet, else ''; `ran` milliseconds since the
--   container was known to run, '' if it was not.

local group, instance, incarnation = ARGV[1], ARGV[2], ARGV[3]
local lease, wanted, daemon = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local FIRST_QUEUE = 7
local adopting = #ARGV < FIRST_QUEUE -- takes only what may run already
local MAX_TRACESTATE = 512 -- what W3C Trace Context asks everybody to carry
local MAX_UNPACK = 1000 -- Lua's stack holds less than 8000 values
local SUSPICIOUS = 2 -- owners that a task must have killed until it is kept from others like it
local MAX_PREFERRING = 100 -- tasks kept for other daemons that one call passes over; then it takes them
local max_bytes, lists = limits().max_bytes, are_lists()
local now = now_ms()
local ENTRY_FIELDS = { task = true, traceparent = true, tracestate = true }
local taken = {}
local set_aside = {} -- what this instance must not take now, to be put back
local preferring = 0
go_on_without_memory()

local function is_suspicious(deaths)
  return tonumber(deaths ~= '' and deaths or 0) >= SUSPICIOUS
end

-- Whether this instance holds a suspect.
local function holds_suspect()
  local id = redis.call('HGET', SUSPECTS, instance)
  local r = id and fields_of(id, 'owner', 'instance', 'deaths')
  return r and r[1] ~= '' and r[2] == instance and is_suspicious(r[3])
end

-- Whether a task waits for a daemon that is not ours. A time too far ahead is none: the clock was
-- set back since.
local function prefers_another(prefers, until_ms)
  if prefers == '' or prefers == daemon or preferring >= MAX_PREFERRING then
    return false
  end
  local left = tonumber(until_ms) - now
  return left > 0 and left <= PREFER_MS
end

local function hold(id)
  local fence = redis.call('HINCRBY', META, 'fence', 1)
  local owner = instance .. '/' .. incarnation .. '/' .. int(fence)
  redis.call('HSET', record_key(id), 'owner', owner, 'instance', instance, 'fence', int(fence), 'entry', '',
    'taken', int(now))
  redis.call('HDEL', record_key(id), 'prefers', 'prefers_until')
  redis.call('ZADD', LEASES, int(now + lease), id)
  return owner, int(fence)
end

local function give(id, fields)
  local owner, fence = hold(id)
  local r = fields_of(id, 'queue', 'attempt', 'doc', 'source', 'traceparent', 'tracestate', 'accepted',
    'app', 'infra', 'cancel', 'cause', 'daemon', 'container', 'oversize', 'digest', 'odd', 'begun')
  if not fields and r[15] == '' and r[14] == '' then
    -- Whoever took this plain entry first died before it was validated.
    fields = r[16] ~= '' and { r[3], '' } or { 'task', r[3] }
  end
  taken[#taken + 1] = { id, r[1], owner, fence, r[2], fields and '' or r[3], r[4], r[14] ~= '' and r[14] or 0,
    r[5], r[6], r[7], r[8], r[9], r[10], r[11], r[12], r[13], r[17] ~= '' and int(now - r[17]) or '', fields or '' }
end

-- The first that still wants to be taken; a record that ended or vanished meanwhile is skipped.
local function take_from(set)
  repeat
    local popped = redis.call('ZPOPMIN', set)
    local id = popped[1]
    local r = id and fields_of(id, 'state', 'owner', 'deaths', 'container', 'prefers', 'prefers_until')
    if r and r[1] ~= '' and not ENDED[r[1]] and r[2] == '' then
      local suspicious = is_suspicious(r[3])
      if adopting and r[4] == '' or suspicious and holds_suspect() then
        set_aside[#set_aside + 1] = { set, popped[2], id }
      elseif prefers_another(r[5], r[6]) then
        preferring = preferring + 1
        set_aside[#set_aside + 1] = { set, popped[2], id }
      else
        if suspicious then
          redis.call('HSET', SUSPECTS, instance, id)
        end
        give(id)
        return true
      end
    end
  until not id
  return false
end

-- Smooth weighted round robin (as in nginx): every candidate gains its weight, the richest is
-- picked and pays the total. A queue of weight 0 is picked only when no other has anything.
local function share_out(queues, n)
  local turns = redis.call('HGETALL', BASE .. 'meta:turns')
  local credit = {}
  for i = 1, #turns, 2 do
    credit[turns[i]] = tonumber(turns[i + 1])
  end
  for _, q in ipairs(queues) do
    q.picks = 0
  end
  local function pick(idle)
    local best, total = nil, 0
    for _, q in ipairs(queues) do
      if q.left > 0 and (q.weight == 0) == idle then
        local weight = idle and 1 or q.weight
        credit[q.name] = (credit[q.name] or 0) + weight
        q.weighed = true
        total = total + weight
        if not best or credit[q.name] > credit[best.name] then
          best = q
        end
      end
    end
    if best then
      credit[best.name] = credit[best.name] - total
      best.left, best.picks = best.left - 1, best.picks + 1
    end
    return best
  end
  for _ = 1, n do
    if not pick(false) and not pick(true) then
      break
    end
  end
  for _, q in ipairs(queues) do
    if q.weighed then -- who was passed over as well: it is owed its turn by the next call
      redis.call('HSET', BASE .. 'meta:turns', q.name, int(credit[q.name]))
    end
  end
end

-- What some other reader of the group took and never acknowledged comes first, after a lease.
local function read_abandoned(q, count)
  local pending = redis.pcall('XPENDING', stream_of(q.name), group)
  if pending.err or pending[1] == 0 then
    return {}
  end
  local claimed = redis.call('XAUTOCLAIM', stream_of(q.name), group, instance, int(lease), '0-0', 'COUNT', count)
  local entries = {}
  for _, entry in ipairs(claimed[2]) do
    if entry and entry[2] then -- Redis 6.2 lists what was deleted as well, as nothing
      entries[#entries + 1] = entry
    end
  end
  return entries
end

local function read_list(q, count)
  local entries = {}
  for _ = 1, count do
    local element = redis.call('RPOP', stream_of(q.name))
    if not element then
      break
    end
    local token, id = string.match(element, '^\1(%d+%-%d+) (.*)$')
    if id and fields_of(id, 'source')[1] == token then
      entries[#entries + 1] = { token, { 'ref', id } }
    else -- also what looks like a reference and is none of ours: its bytes are kept
      local entry = int(now) .. '-' .. int(redis.call('HINCRBY', META, 'fence', 1))
      entries[#entries + 1] = { entry, { 'task', element } }
    end
  end
  return entries
end

local function read(q, count)
  local abandoned = read_abandoned(q, count)
  if #abandoned > 0 then
    return abandoned, true
  end
  local command = { 'XREADGROUP', 'GROUP', group, instance, 'COUNT', count, 'STREAMS', stream_of(q.name), '>' }
  local reply = redis.pcall(unpack(command))
  if reply and reply.err then
    if not string.find(reply.err, 'NOGROUP', 1, true) then
      return reply
    end
    redis.call('XGROUP', 'CREATE', stream_of(q.name), group, '0', 'MKSTREAM')
    reply = redis.call(unpack(command))
  end
  return reply and reply[1] and reply[1][2] or {}
end

-- An entry that a program of any language XADDed becomes a task here; its bytes are kept and
-- validated right after, by whoever holds it.
local function adopt_entry(q, entry, fields)
  local known, size = {}, 0
  local odd = '' -- whether it is more or less than a task with its trace
  for i = 1, #fields, 2 do
    size = size + #fields[i] + #fields[i + 1]
    if known[fields[i]] or not ENTRY_FIELDS[fields[i]] then
      odd = '1'
    end
    known[fields[i]] = fields[i + 1]
  end
  local document, traceparent, tracestate = known.task, known.traceparent or '', known.tracestate or ''
  local id = q.name .. '.' .. entry
  if redis.call('EXISTS', record_key(id)) == 1 then
    id = id .. '.' .. int(redis.call('HINCRBY', META, 'fence', 1)) -- somebody chose this id by hand
  end
  local original = document or table.concat(fields, ' ')
  local accepted = accepted_at(entry)
  local record = { record_key(id), 'queue', q.name, 'state', 'queued', 'accepted', accepted, 'attempt', '1',
    'source', entry }
  local function set(name, value)
    record[#record + 1] = name
    record[#record + 1] = value
  end
  local oversize = #original > max_bytes and #original or (size > max_bytes + 1024 and size or 0)
  set('odd', document and odd or '1')
  if oversize > 0 then
    set('oversize', int(oversize))
    set('doc_size', int(#original))
    set('doc_sha1', redis.sha1hex(original))
    fields, traceparent, tracestate = {}, '', ''
  else
    set('doc', original)
  end
  set('traceparent', plausible_trace(traceparent))
  set('tracestate', #tracestate <= MAX_TRACESTATE and tracestate or '')
  redis.call('HSET', unpack(record))
  redis.call('ZADD', OPEN, accepted, id)
  give(id, fields)
end

local function take_entries(q, entries)
  local ids = {}
  for _, entry in ipairs(entries) do
    local id, fields = entry[1], entry[2] or {}
    ids[#ids + 1] = id
    local refers = #fields == 2 and fields[1] == 'ref'
    local r = refers and fields_of(fields[2], 'state', 'entry', 'source', 'queue')
    if r and r[1] == 'queued' and r[2] == id then
      if lists then
        redis.call('HINCRBY', META, 'references:' .. r[4], -1)
      end
      give(fields[2])
    elseif not r or r[3] ~= id then -- also a reference that we did not make
      adopt_entry(q, id, fields)
    end
  end
  for first = 1, lists and 0 or #ids, MAX_UNPACK do
    local last = math.min(#ids, first + MAX_UNPACK - 1)
    redis.call('XACK', stream_of(q.name), group, unpack(ids, first, last))
    redis.call('XDEL', stream_of(q.name), unpack(ids, first, last))
  end
end

local function put_aside_back()
  for _, kept in ipairs(set_aside) do
    redis.call('ZADD', unpack(kept))
  end
end

local queues = {}
for i = FIRST_QUEUE, #ARGV, 2 do
  if redis.call('SISMEMBER', PAUSED, ARGV[i]) == 0 and is_usable(ARGV[i]) then
    queues[#queues + 1] = { name = ARGV[i], weight = tonumber(ARGV[i + 1]) }
  end
end

while daemon ~= '' and #taken < wanted and take_from(inbox_of(daemon)) do
end
for _, q in ipairs(queues) do
  q.left = redis.call('ZCARD', ready_of(q.name)) + length_of(q.name)
end
local short = true
while short and #taken < wanted do
  short = false
  share_out(queues, wanted - #taken)
  for _, q in ipairs(queues) do
    while q.picks > 0 and take_from(ready_of(q.name)) do
      q.picks = q.picks - 1
    end
    if q.picks > 0 then
      local entries, more
      if lists then
        entries = read_list(q, q.picks)
      else
        entries, more = read(q, q.picks)
      end
      if entries.err then
        put_aside_back()
        return entries
      end
      if #entries < q.picks and not more then
        q.left, short = 0, true -- another reader has the rest pending: its share is for the others
      end
      take_entries(q, entries)
    end
  end
end
put_aside_back()
return taken
