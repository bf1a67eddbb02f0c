-- Gives up to n tasks to one instance: read, acknowledged, deleted, recorded and leased in
-- this one step, so that a task is always either waiting or in somebody's hands.
-- ARGV: group, instance, incarnation, lease_ms, n, daemon, then queue, weight, …
-- Order: the daemon's inbox; then the queues by weight. In a queue's turn what came back
-- (`ready`) goes first, by time of acceptance, and then its stream.
-- Returns per task {id, queue, owner, fence, attempt, document, source, oversize, traceparent,
--   tracestate, accepted, app_failures, infra_failures, cancel, cause, daemon, fields}; `fields`
--   is the raw entry of a task that nobody has validated yet, else ''.

local group, instance, incarnation = ARGV[1], ARGV[2], ARGV[3]
local lease, wanted, daemon = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local FIRST_QUEUE = 7
local MAX_TRACESTATE = 512 -- what W3C Trace Context asks everybody to carry
local MAX_UNPACK = 1000 -- Lua's stack holds less than 8000 values
local max_bytes = limits().max_bytes
local now = now_ms()
local taken = {}
go_on_without_memory()

local function hold(id)
  local fence = redis.call('HINCRBY', META, 'fence', 1)
  local owner = instance .. '/' .. incarnation .. '/' .. int(fence)
  redis.call('HSET', record_key(id), 'owner', owner, 'instance', instance, 'fence', int(fence), 'entry', '')
  redis.call('ZADD', LEASES, int(now + lease), id)
  return owner, int(fence)
end

local function give(id, fields, oversize)
  local owner, fence = hold(id)
  local r = fields_of(id, 'queue', 'attempt', 'doc', 'source', 'traceparent', 'tracestate', 'accepted',
    'app', 'infra', 'cancel', 'cause', 'daemon')
  taken[#taken + 1] = { id, r[1], owner, fence, r[2], fields and '' or r[3], r[4], oversize or 0, r[5], r[6],
    r[7], r[8], r[9], r[10], r[11], r[12], fields or '' }
end

-- The first that still wants to be taken; a record that ended or vanished meanwhile is skipped.
local function take_from(set)
  repeat
    local id = redis.call('ZPOPMIN', set)[1]
    local r = id and fields_of(id, 'state', 'owner')
    if r and r[1] ~= '' and not ENDED[r[1]] and r[2] == '' then
      give(id)
      return true
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

local function read(q, count)
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
  local document, traceparent, tracestate, size = nil, '', '', 0
  for i = 1, #fields, 2 do
    size = size + #fields[i] + #fields[i + 1]
    if fields[i] == 'task' then
      document = fields[i + 1]
    elseif fields[i] == 'traceparent' then
      traceparent = fields[i + 1]
    elseif fields[i] == 'tracestate' then
      tracestate = fields[i + 1]
    end
  end
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
  if oversize > 0 then
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
  give(id, fields, oversize)
end

local function take_entries(q, entries)
  local ids = {}
  for _, entry in ipairs(entries) do
    local id, fields = entry[1], entry[2] or {}
    ids[#ids + 1] = id
    local refers = #fields == 2 and fields[1] == 'ref'
    local r = refers and fields_of(fields[2], 'state', 'entry', 'source')
    if r and r[1] == 'queued' and r[2] == id then
      give(fields[2])
    elseif not r or r[3] ~= id then -- also a reference that we did not make
      adopt_entry(q, id, fields)
    end
  end
  for first = 1, #ids, MAX_UNPACK do
    local last = math.min(#ids, first + MAX_UNPACK - 1)
    redis.call('XACK', stream_of(q.name), group, unpack(ids, first, last))
    redis.call('XDEL', stream_of(q.name), unpack(ids, first, last))
  end
end

local queues = {}
for i = FIRST_QUEUE, #ARGV, 2 do
  if redis.call('SISMEMBER', PAUSED, ARGV[i]) == 0 then
    queues[#queues + 1] = { name = ARGV[i], weight = tonumber(ARGV[i + 1]) }
  end
end

while daemon ~= '' and #taken < wanted and take_from(inbox_of(daemon)) do
end
for _, q in ipairs(queues) do
  q.left = redis.call('ZCARD', ready_of(q.name)) + redis.call('XLEN', stream_of(q.name))
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
      local entries = read(q, q.picks)
      if entries.err then
        return entries
      end
      if #entries < q.picks then
        q.left, short = 0, true -- another reader has the rest pending: its share is for the others
      end
      take_entries(q, entries)
    end
  end
end
return taken
