-- Cancels one task in whatever phase it is. ARGV: id.
-- Returns {verdict, state}: unknown; ended (it had its end already); cancelled (it has it now);
--   requested (its owner has been told, and stops it).

local id = ARGV[1]

-- A plain entry that nobody has taken has no record yet: its id tells where it lies.
local function record_of_entry()
  local queue, entry = string.match(id, '^([a-z0-9-]+)%.(%d+%-%d+)$')
  if not queue or not registered(queue) then
    return false -- the names of other streams of ours are not registered
  end
  if are_lists() then
    return false -- an element of a list has no id that its producer could know
  end
  local found = redis.pcall('XRANGE', stream_of(queue), entry, entry) -- fails for a number past 64 bits
  if found.err or not found[1] then
    return false
  end
  local document, traceparent, fields = '', '', found[1][2]
  for i = 1, #fields, 2 do
    if fields[i] == 'ref' then
      return false -- it carries a task that has an id of its own
    elseif fields[i] == 'task' then
      document = fields[i + 1]
    elseif fields[i] == 'traceparent' then
      traceparent = fields[i + 1]
    end
  end
  redis.call('HSET', record_key(id), 'queue', queue, 'state', 'queued', 'accepted', accepted_at(entry),
    'attempt', '1', 'source', entry, 'entry', entry, 'doc', document, 'traceparent', plausible_trace(traceparent))
  return true
end

go_on_without_memory()
if redis.call('EXISTS', record_key(id)) == 0 and not record_of_entry() then
  return { 'unknown', '' }
end
local alias = fields_of(id, 'alias')[1]
if alias ~= '' then
  id = alias
end
local r = fields_of(id, 'state', 'owner', 'daemon')
local state, owner = r[1], r[2]
if state == '' then
  return { 'unknown', '' }
elseif ENDED[state] then
  return { 'ended', state }
end
redis.call('HSET', record_key(id), 'cancel', '1')
if owner ~= '' then
  local instance = string.match(owner, '^(.*)/[^/]*/[^/]*$')
  local control = BASE .. 'control:' .. instance
  redis.call('XADD', control, 'MAXLEN', '~', 1000, '*', 'op', 'cancel', 'id', id, 'asked', owner)
  redis.call('PEXPIRE', control, 3600000)
  return { 'requested', state }
end
if r[3] ~= '' then
  return { 'requested', state } -- its container waits in an inbox: whoever adopts it stops it
end
withdraw(id)
close(id, { state = 'cancelled', message = 'cancelled before it started' })
return { 'cancelled', 'cancelled' }
